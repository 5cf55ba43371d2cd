"""The 40 CelebA attributes, as far as the drawing decides them; the rest is nan."""

import numpy as np

from emollama_jax.data.action_units import AU
from emollama_jax.data.face_labels import ATTRIBUTES
from emollama_jax.tiny.actionfaces.camera import Scene
from emollama_jax.tiny.actionfaces.identity import Identity


def _between(value: float, low: float, high: float) -> float:
    """Returns 0 below `low`, 1 above `high` and nan between, where two people would disagree."""
    return 0.0 if value < low else 1.0 if value > high else float("nan")


def attributes(person: Identity, units: np.ndarray, scene: Scene) -> np.ndarray:
    """Returns float32 [40] in {0, 1, nan} for a person with action units float32 [K] in a scene."""
    hair = person.hair_colour if person.hair_style != "bald" else "none"
    raised = 0.5 * float(units[AU[1]] + units[AU[2]]) - 0.6 * float(units[AU[4]])
    open_mouth = max(float(units[AU[25]]), 1.4 * float(units[AU[26]]), 1.2 * float(units[AU[16]]))
    eye = person.eye_height * (1 - person.rest_lid)
    eye += (
        0.45 * float(units[AU[5]])
        - 0.5 * float(units[AU[7]])
        - 0.35 * float(units[AU[6]] + units[AU[9]])
    )
    eye -= float(units[AU[45]])
    shows_eyes = scene.occlusion != "sunglasses"
    known = {
        "5_o_Clock_Shadow": float(person.stubble > 0),
        "Arched_Eyebrows": _between(raised + 8 * person.brow_arch, 0.22, 0.42),
        "Bald": float(person.hair_style == "bald"),
        "Bangs": float(person.hair_style == "fringe"),
        "Big_Lips": _between(person.lip_fullness, 1.0, 1.22),
        "Big_Nose": _between(person.nose_width, 1.02, 1.16),
        "Black_Hair": float(hair == "black"),
        "Blond_Hair": float(hair == "blond"),
        "Blurry": 0.0 if scene.blur < 0.3 else 1.0 if scene.blur > 0.55 else float("nan"),
        "Brown_Hair": float(hair == "brown"),
        "Bushy_Eyebrows": _between(person.brow_thickness, 1.05, 1.3),
        "Chubby": _between(person.cheek_fullness, 0.6, 0.85),
        "Eyeglasses": float(person.glasses != "none" or not shows_eyes),
        "Goatee": 0.0 if not person.beard else float("nan"),
        "Gray_Hair": float(hair == "gray"),
        "Heavy_Makeup": _between(person.makeup, 0.2, 0.6),
        "Male": float(person.gender == 0),
        "Mouth_Slightly_Open": _between(open_mouth, 0.15, 0.35),
        "Mustache": float(person.moustache > 0),
        "Narrow_Eyes": 1.0 - _between(eye, 0.55, 0.85) if shows_eyes else float("nan"),
        "No_Beard": float(person.beard == 0 and person.moustache == 0 and person.stubble == 0),
        "Pale_Skin": _between(sum(person.skin) / 3, 205, 222),
        "Receding_Hairline": _between(person.hairline, 0.08, 0.15)
        if hair != "none"
        else float("nan"),
        "Smiling": _between(float(units[AU[12]]), 0.13, 0.25),
        "Straight_Hair": float(person.hair_style in ("long", "side_part", "fringe"))
        if hair != "none"
        else 0.0,
        "Wavy_Hair": float(person.hair_style == "wavy"),
        "Wearing_Earrings": float(person.earrings),
        "Wearing_Hat": 0.0,
        "Wearing_Lipstick": float(person.lipstick),
        "Wearing_Necklace": 0.0,
        "Wearing_Necktie": 0.0,
        "Young": 0.0 if person.age >= 5 else 1.0 if person.age <= 3 else float("nan"),
    }
    return np.array([known.get(name, np.nan) for name in ATTRIBUTES], np.float32)

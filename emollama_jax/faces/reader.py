"""The face of an example: found and cut out, then read by FaceXFormer. Nothing is stored here."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emollama_jax.data.face_crop import Faces, crop_face
from emollama_jax.data.priors import Prior
from emollama_jax.models.facexformer import FaceXFormer
from emollama_jax.models.layers import normalise
from emollama_jax.models.parameters import named_parameters
from emollama_jax.terms import LANDMARKS

Detect = Callable[[Sequence[np.ndarray]], Sequence[Faces]]  # uint8 [H, W, 3] each → its faces


@dataclasses.dataclass(frozen=True)
class FaceCrops:
    """The face of one example, followed and cut out; F = stored frames of its media."""

    boxes: np.ndarray  # float32 [F, 4], (x1, y1, x2, y2) in pixels; zeros where not found
    found: np.ndarray  # bool [F]
    crops: np.ndarray  # uint8 [F, S, S, 3]; zeros where not found


def local_mesh() -> Mesh:
    """This host's devices in a row, for `Reader` and `Detector`: each takes its share of frames."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("frames",), axis_types=(AxisType.Auto,), devices=devices)


class Reader:
    """The frozen FaceXFormer's heads on face crops, in batches of one static size.

    Args:
        face: the network.
        margin: margin of the crop, as in `crop_box`.
        batch: crops at a time on each device.
        mesh: mesh of `local_mesh`, whose devices share a batch; None for the device of the weights.
    """

    def __init__(
        self, face: FaceXFormer, *, margin: float, batch: int = 128, mesh: Mesh | None = None
    ):
        graphdef, self._state = nnx.split(face)
        cfg = face.cfg
        self.size, self.margin = cfg.swin.image_size, margin
        self._batch = batch * (mesh.size if mesh else 1)
        whole = split = None
        if mesh:
            whole = NamedSharding(mesh, PartitionSpec())
            split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._state = jax.device_put(self._state, whole)
        digest = hashlib.sha256(repr((cfg, margin)).encode())
        for name, leaf in named_parameters(face).items():
            digest.update(name.encode() + np.asarray(leaf[...], np.float32).tobytes())
        self.fingerprint = digest.hexdigest()

        def heads(state, crops):
            y = nnx.merge(graphdef, state)(normalise(crops, cfg.image_mean, cfg.image_std))
            return y.landmarks, tuple(jax.nn.softmax(x) for x in (y.age, y.gender, y.race))

        self._heads = jax.jit(heads, in_shardings=(whole, split), out_shardings=split)

    def __call__(self, crops: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Landmarks [F, 68, 2] and the probabilities of age [F, 8], gender [F, 2], race [F, 5].

        Args:
            crops: uint8 [F, S, S, 3], F > 0.
        """
        parts = []
        for start in range(0, len(crops), self._batch):
            part = crops[start : start + self._batch]
            padded = np.zeros((self._batch, *crops.shape[1:]), np.uint8)
            padded[: len(part)] = part
            heads = jax.device_get(self._heads(self._state, padded))
            parts.append((len(part), heads))
        return jax.tree.map(
            lambda *xs: np.concatenate([x[:n] for (n, _), x in zip(parts, xs, strict=True)]),
            *(heads for _, heads in parts),
        )


def cut_out(
    frames: Sequence[np.ndarray], boxes: np.ndarray, found: np.ndarray, *, reader: Reader
) -> FaceCrops:
    """The crops of one face.

    Args:
        frames: F uint8 pictures.
        boxes: float32 [F, 4], (x1, y1, x2, y2) in pixels.
        found: bool [F].
        reader: reader with the crop size and margin.
    """
    crops = np.zeros((len(frames), reader.size, reader.size, 3), np.uint8)
    for i in np.flatnonzero(found):
        crops[i], _ = crop_face(frames[i], boxes[i], reader.margin, reader.size)
    return FaceCrops(boxes=np.asarray(boxes, np.float32), found=found, crops=crops)


def read_faces(faces: Sequence[FaceCrops], reader: Reader) -> list[Prior]:
    """The priors of several examples, their crops read together."""
    if not faces:
        return []
    crops = np.concatenate([face.crops[face.found] for face in faces])
    landmarks, heads = reader(crops) if len(crops) else (None, ())
    priors, start = [], 0
    for face in faces:
        rows = slice(start, start + int(face.found.sum()))
        start = rows.stop
        points = np.zeros((len(face.found), LANDMARKS, 2), np.float32)
        if face.found.any():
            points[face.found] = landmarks[rows]
        agr = age_gender_race([head[rows] for head in heads])
        priors.append(Prior(face.boxes, face.found, points, *agr))
    return priors


def age_gender_race(heads: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Class of each from the mean over frames, int32 [3], and its probability, float32 [3].

    Args:
        heads: probabilities of age, gender and race in the F frames with a face, [F, classes].

    Returns:
        Zeros where F is 0.
    """
    if not heads or not len(heads[0]):
        return np.zeros(3, np.int32), np.zeros(3, np.float32)
    means = [head.mean(0) for head in heads]
    classes = np.array([mean.argmax() for mean in means], np.int32)
    return classes, np.array([mean.max() for mean in means], np.float32)

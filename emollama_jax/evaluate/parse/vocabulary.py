"""Which class of a set a word names."""

from emollama_jax.data.emotions import SYNONYMS, LabelSpace, stem


def vocabulary(space: LabelSpace) -> dict[str, str]:
    """Words → the classes of a space, whatever name the space gives them ("happy", "happiness").

    Where two classes mean the same to other sets ("calm" and "neutral"), a word goes to the class
    that it is a form of; others go to the class of the shared name, if there is one.
    """
    own = {stem(name.casefold()): name for name in space.classes}
    alike: dict[str, list[str]] = {}
    for name, common in zip(space.classes, space.canonical, strict=True):
        alike.setdefault(common, []).append(name)
    table = {}
    for word, common in {**SYNONYMS, **{name: name for name in alike}}.items():
        if len(alike.get(common, ())) == 1:
            table[word] = alike[common][0]
        elif common in alike and (found := own.get(stem(word)) or own.get(common)):
            table[word] = found
    return table | {name.casefold(): name for name in space.classes}

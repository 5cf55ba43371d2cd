"""A conversation format in the words of one tokenizer: what prompts are written with."""

from emollama_jax.config import Config
from emollama_jax.data import templates
from emollama_jax.data.templates import BOS, EOS, TEMPLATES, Template, Token
from emollama_jax.data.tokenizers import Tokenizer, carried_by, load_tokenizer
from emollama_jax.errors import UserError


class Chat:
    """A format with its tokenizer; pickles with it.

    Attributes:
        end: token that ends an answer and counts in the loss.
        stop: tokens that end a generated answer: `end`, and the tokenizer's own.
        pad: fills up.
        first: only token of a row without text.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer):
        """Looks up the format's tokens.

        Raises:
            UserError: the tokenizer lacks one.
        """
        self.template, self.tokenizer = template, tokenizer
        own = {BOS: tokenizer.bos, EOS: tokenizer.eos}
        found = {t: own[t] if t in own else tokenizer.token(t) for t in template.tokens}
        missing = [str(token) for token, i in found.items() if i is None]
        if missing:
            names = ", ".join("bos_token" if name == BOS else name for name in missing)
            raise UserError(
                f"the conversation format {template.name} needs special tokens that the LLM's "
                f"tokenizer lacks ({names}): choose another data.template or data.llm_tokenizer"
            )
        self._ids = {token: int(i) for token, i in found.items() if i is not None}
        self.end = self._ids[template.end]
        self.stop = tuple(dict.fromkeys((self.end, tokenizer.eos)))
        self.pad = tokenizer.pad
        self.first = self.end if tokenizer.bos is None else tokenizer.bos

    def id(self, token: Token) -> int:
        """Id of a token of the format."""
        return self._ids[token]


def open_chat(cfg: Config) -> Chat:
    """The conversation format and the LLM's tokenizer of a config.

    Raises:
        UserError: files that are not there or of another kind, or two that do not fit.
    """
    name = cfg.data.template
    if name == "weights":
        file = carried_by(cfg.weights, templates.TEMPLATE_FILE, key="data.template")
        template = templates.read_template(file.read_text(), name=file)
    else:
        template = TEMPLATES[name]
    return Chat(template, load_tokenizer(cfg.data.llm_tokenizer, weights=cfg.weights))

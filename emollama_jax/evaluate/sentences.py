"""What sentences say of emotions: which they assert, and which they only mention.

Every emotion word becomes one sign, `E`, and patterns of plain English are searched around these
signs. A pattern gives what it covers a weight:

  DENIED   "not happy", "rather than fear", "could be mistaken for anger", "is it disgust?",
           "at first glance sad", "the options were …", a list of three or more;
  MINOR    "a hint of fear", "perhaps sad", "raised brows can mean surprise";
  PLAIN    any other mention;
  STRONG   "mostly sad", "the dominant emotion is fear", "so I would say anger", a bold word.

The heaviest mentions are the answer, if they name one class. Where English leaves it open, the
patterns deny: an answer too many that says nothing is better than a wrong one.
"""

import dataclasses
import enum
import re
from collections.abc import Mapping

_SIGN = "\ue000"
_BOLD = ("\ue001", "\ue002")


class Weight(enum.IntEnum):
    DENIED = 0
    MINOR = 1
    PLAIN = 2
    STRONG = 3


@dataclasses.dataclass(frozen=True)
class Mention:
    """A mention of an emotion."""

    word: str
    label: str | None  # its class; None: of an emotion that the set lacks
    weight: Weight
    listed: bool  # one of three or more in a row


@dataclasses.dataclass(frozen=True)
class Sayings:
    """What a text says."""

    mentions: tuple[Mention, ...]
    contrasts: bool  # something is set against something else: what is slight is no answer then
    refuses: bool  # "I cannot identify emotions"


# ---- the parts of a pattern; E, LIST and so on stand for these

_STOPS = (
    r"but|and|rather|instead|however|although|though|while|whereas|because|since|then|which|who|so(?! much\b)"
    r"|yet|suggesting|indicating|showing|conveying|making|hence|therefore|thus"
)
_PERSON = r"he|she|they|it|i|we|you|there|this"
_VERBS = (
    r"is|are|was|were|looks?|looked|seems?|seemed|appears?|appeared|has|have|shows?|showed|shown"
    r"|displays?|conveys?|conveyed|expresses|expressed|feels?|felt|suggests?|suggested|indicates?"
    r"|indicated|implies|reflects?|signals?|signalled|points?|means|gives|makes|reads|tells"
    r"|exhibits?|experiences"
)
_PARTS = {
    "DET": r"(?:(?:an?|the|any|of|some|his|her|their|its|even|mild|slight|clear|strong|intense"
    r"|genuine|pure|extreme|signs?|hints?|traces?|either|both|feeling|being|looking|perhaps|very"
    r"|maybe|evident|obvious|visible|just|simply|only|more|to|be) +)",
    "WORD": rf"(?:(?!(?:{_STOPS})\b)[\w'/-]+ +)",  # of a clause
    "NOUN": rf"(?:(?!(?:{_STOPS}|{_PERSON}|{_VERBS})\b)[\w'/-]+ +)",  # of a phrase without a verb
    "ANY": r"(?:[\w'/-]+ +)",
}
# After an emotion: what "or" ties to it, or a list that ends in "and", "or", or in "other emotion".
_MORE = (
    r"(?: *(?:,? +(?:or|nor|and/or)|/) *(?:WORD){0,3}?E| +and +(?:(?:an?|the|any|of|some) +){0,2}E)*"
    r"(?:(?: *, *(?:DET){0,3}E)+ *,? +(?:or|and|nor) +(?:DET){0,3}(?:E|other\b|anything\b))?"
    r"(?: *, *(?:or|nor) +(?:DET){0,3}E)?"
)
_CLAUSE = r"[^.;:!?\n()]"
_TO_COMMA = r"[^.,;:!?\n()]"


def _pattern(text: str) -> re.Pattern:
    text = text.replace("LIST", f"(?:DET){{0,3}}E{_MORE}")
    for name, part in _PARTS.items():
        text = text.replace(name, part)
    return re.compile(text.replace("E", _SIGN))


# Idioms that only look like a denial or an emotion, and are taken out.
_IDIOMS = re.compile(
    r"\bnot (?:only|just|merely|simply|(?:\w+ )?(?:sure|certain|clear)(?! (?:if|whether|that)\b))"
    r"|\b(?:no|without(?: an?y?)?|beyond(?: any| an?)?)(?: \w+)? (?:doubt|question|hesitation)\b"
    r"|\b(?:cannot|can't|can not|couldn't|could not|doesn't|does not|hard to|impossible to"
    r"|unable to|hardly) (?:be )?(?:deny|denied|hide|hidden|conceal\w*|contain\w*|help|miss)\b"
    r"(?: but)?"
    r"|\bcould(?:n't| not) (?:be|look|seem|appear)(?: any)?(?: more)?\b"
    r"|\bnever (?:been|looked|seemed|felt)(?: so| more| this)?\b"
    r"|\b(?:nothing|none|no one|no other(?: \w+)?) (?:but|except|(?:other|less|short|else) (?:than|of))"
    r"|\bnot (?:to mention|least)\b|\bno wonder\b|\b(?:is|are|be|looks?|seems?|appears?) more than(?= E)|\bif anything\b"
    .replace("E", _SIGN)
)
_COURTESY = (  # before emotion words are looked for
    r"\b(?:i'd|i would|i'm|i am|i'll|we're|we are|i will)(?: be)?(?: more than| very| so| always)?"
    r" (?:happy|glad|pleased|delighted) to\b"
    r"|\b(?:i'm|i am) afraid(?= (?:i|that|there|it|the|this|not|we|you)\b|,)"
    r"|\bi fear(?= (?:that|i)\b)|(?:^|(?<=[.!?\n] ))(?:sadly|happily),|\bhappy (?:birthday|new year"
    r"|holidays|hour|ending|to (?:help|assist))\b|\b(?:anger|fear) management\b|\bcalm down\b"
    r"|\b(?:sad|glad|sorry|happy) to say\b|\bhappy medium\b|\bmad (?:scientist|max)\b"
    r"|\bneutral(?= (?:\w+ )?(?:background|backdrop|colou?r|tones?\b|lighting|wall|position|setting"
    r"|cloth|palette|context|light\b))|\bblank(?= (?:\w+ )?(?:background|backdrop|wall|space))"
    r"|\b(?:calm|blank|neutral)(?= (?:brow|mouth|eyes?\b|lips?\b|stare|gaze|forehead|cheeks?))"
    r"|\banger(?= the brows?\b)"
)
_NO_EMOTION = re.compile(
    r"(?:\b(?:no|without(?: any)?|devoid of(?: any)?|absence of(?: any)?|lack(?:s|ing)?(?: of)?"
    r"(?: any)?)|(?:n't|\bnot|\bnever) (?:really )?(?:show|display|express|exhibit|convey|have)\w*"
    r" any)(?:"
    r" (?:visible|particular|strong|specific|discernible|obvious|apparent|real|noticeable"
    r"|evident|facial|significant|distinct|overt|pronounced|observable))?"
    r" (?:emotions?|expressions?|feelings?)\b(?! (?:can|could|cannot|to be|is (?:given|listed)"
    r"|other|besides|except|label|recognition|such|like)\b)"
)

# ---- patterns of each weight

_N = (  # what denies the rest of its clause
    r"not|no|never|none|nor|neither|nothing|nobody|cannot|hardly|barely|scarcely|rarely|seldom"
    r"|non|[a-z]+n't|doubt(?:s|ed|ful|fully)?|unlikely|refus(?:es|ed) to|fail(?:s|ed)? to"
    r"|ceas(?:es|ed)|far from|anything but|impossible|unable|(?:hard|difficult) to \w+|stop(?:s|ped)? (?:being|looking|feeling)"
)
_OF = r"lack of|absence of|without|lacking|lacks|free of|devoid of|minus"
_THAN = (  # what denies the next phrase
    r"rather than|instead of|in place of|in lieu of|opposed to|in contrast (?:to|with)|contrary to"
    r"|compared (?:to|with)|unlike|except(?: for)?|besides|apart from|aside from|other than"
    r"|excluding|exclud(?:es?|ed)|differen(?:t|ce) (?:from|to|than)|distinct from|differs? from"
    r"|opposite of|against|less(?: like(?:ly)?| of)?|least(?: likely)?|vs|versus|despite"
    r"|in spite of|regardless of|notwithstanding|if not|short of|(?<!more )than"
    r"|inconsistent with|incompatible with|at odds with|contradicts?|conflicts? with"
    r"|(?:rul|leav)(?:es?|ed|ing)(?: it| that)? out|(?<!be )(?<!is )considered|considering|dismiss(?:es|ed|ing)?"
    r"|reject(?:s|ed|ing)?|discard(?:s|ed|ing)?|eliminat(?:es?|ed|ing)|discount(?:s|ed|ing)?"
    r"|fak(?:es?|ed|ing)|feign(?:s|ed|ing)?|pretend(?:s|ed|ing)?|simulat(?:es?|ed|ing)"
    r"|supposed(?: to be)?|so-called|pseudo|mimic(?:s|ked|king)?|mocks?|mocking"
    r"|(?:hid(?:es?|ing)|mask(?:s|ing|ed)?|suppress(?:es|ing|ed)?|conceal(?:s|ing|ed)?)"
    r"|expected|expecting|no longer|more than|forget|ignor(?:e|es|ed|ing)|disregard(?:s|ed|ing)?|never mind"
    r"|(?:wins?|won|prevails?|dominates?|triumphs?) over|(?:beat|outweigh|overrid|trump|overshadow"
    r"|exceed)(?:s|es|ing)?"
)
_ABSENT = (  # what an emotion "is", if it is not there
    r"(?:\w+ +){0,2}?(?:not|never|no longer|nowhere|absent|missing|unlikely|improbable"
    r"|implausible|impossible|excluded|ruled out|rejected|eliminated|dismissed|wrong|incorrect"
    r"|false|out of|less|merely|only|just an?|a mistake|a misreading|an illusion|inaccurate"
    r"|unsuitable|inappropriate|hardly|barely|lacking|too (?:strong|much|weak)|neither|negligible"
    r"|doubtful|no|off the table|weak(?:er)?|secondary|second|third|far-fetched|a distractor"
    r"|a (?:wrong|poor|bad|false|weak)|unconvincing|gone|over|outweighed|overshadowed|dominated|overridden)\b"
)
_SPEAKER = (
    r"(?:question|prompt|user|you|options?|instructions?|captions?|text|titles?|labels?|shirt|sign"
    r"|poster|watermark|banner|file ?name|subtitles?|choices|list|annotat(?:ion|ors?)|raters?|colleagues?|task|note|words?)"
)
_SAYS = (
    r"(?:mention|ask|sa[iy]|suggest|list|nam|offer|includ|read|refer|propos|stat|assum|giv|contain"
    r"|claim|call|describ|hint|provid)\w*"
)

_DENIED = [
    _pattern(text)
    for text in (
        # "not happy", "no sign of fear, or of anger", "not, in my view, sad"
        rf"(?<![\w'])(?:{_N})(?:,[^,.;:!?\n]{{2,30}},)?[ -]+(?:WORD){{0,7}}?"
        rf"(?:(?:and|or|nor) +(?:NOUN){{0,4}}?)?LIST",
        rf"(?<![\w'])(?:{_OF}) +(?:NOUN){{0,7}}?(?:(?:and|or|nor) +(?:NOUN){{0,4}}?)?LIST",
        rf"(?<![\w'])(?:{_THAN}) +(?:NOUN){{0,5}}?LIST",
        r"(?<=E) *,? *(?:over|more than|above) +(?:NOUN){0,2}?LIST",
        # "mistaken for fear"
        r"\b(?:mistak\w+|mistook|taken?|took|confus\w+|misread|mis\w+ed|confounded|passe?d?s?(?: off)?)"
        r" +(?:ANY){0,4}?(?:for|with|as|by) +(?:WORD){0,3}?LIST",
        r"\b(?:confus\w+|mistak\w+|tell|distinguish\w*|separat\w+|differentiat\w+|discriminat\w+) "
        r"+(?:ANY){0,4}?(?:from|apart|E)(?: +(?:ANY){0,3}?(?:from|for|with|and) +(?:ANY){0,2}?LIST)?",
        # "fear is ruled out", "anger can be excluded", "surprise does not fit", "happy: no"
        rf"E{_MORE},?(?: +(?:itself|here|alone|too|also|either|though|however|as an?|at least"
        r"|in this (?:image|face|picture|case|photo)))*,? +(?:is|are|was|were|seems?|appears?"
        r"|looks?|can|could|may|might|must|should|has|have|had|would|remains?|gets?)(?: +be"
        rf"| +been)?(?: +(?:be|been|to))?(?:n't\b| +{_ABSENT})",
        rf"E{_MORE},?(?: +(?:itself|here|alone|too|also|either|though|however))? +(?:(?:does|do|did"
        r"|would|can|could|has|is|are|was)(?:n't| +not)|cannot|can't|fails?|lacks?|needs?|requires?)\b",
        r"E *[:=(–-]+ *(?:no|false|0(?:·0+)?%?|absent|none|n/a|not \w+|✗|✘|❌)(?!\w)",
        r"(?:✗|✘|❌|\[ *\]) *E",
        # "at first glance sad", "what seems to be surprise"
        rf"\b(?:at|on|upon) (?:an? |the |a very )?(?:first|quick|passing|casual|brief|cursory|initial)"
        rf" (?:glance|sight|look|view|impression|inspection)\b,?(?:(?!\b(?:but|yet|while)\b){_TO_COMMA})*",
        rf"(?:(?!\b(?:but|yet|while)\b){_TO_COMMA})*\b(?:at|on|upon) (?:an? |the )?(?:first|quick"
        rf"|passing|casual|brief|cursory|initial) (?:glance|sight|look|view|impression|inspection)\b",
        rf"\b(?:on the surface|superficially|seemingly|ostensibly|(?:my |the )?(?:first|initial)"
        rf" (?:impression|guess|thought|instinct)\w*)\b,?(?:(?!\b(?:but|yet|while)\b){_TO_COMMA})*",
        rf"\bwhat (?:\w+ ){{0,2}}?(?:seem|appear|look|resembl|sound|pass|read|feel|might|may|could)"
        rf"\w* (?:WORD){{0,5}}?LIST",
        rf"\b(?:at first|initially|originally|earlier|previously|before|formerly|used to)\b"
        rf"(?:(?!\b(?:but|yet)\b){_CLAUSE})*(?=\b(?:but|yet|however|actually)\b)",
        # "might look like fear, but …"
        rf"\b(?:might|may|could|can)\b(?:(?!\b(?:but|yet|and)\b){_CLAUSE})*E{_MORE}"
        rf"(?:(?!\b(?:but|yet|and)\b){_CLAUSE})*(?=\b(?:but|yet|however)\b(?! (?:not|i am|i'm)\b))",
        r"\b(?:thought|assumed|believed|guessed|suspected|expected|hoped|feared) +(?:WORD){0,5}?LIST",
        r"\b(?:some|others?|many|people|one|someone|observers?|viewers?|you|they) (?:people |\w+ )?"
        r"(?:might|may|could|would|will|can|tend to|often|say|think|see|call|claim|argue)\b"
        r" *(?:WORD){0,6}?LIST",
        r"\b(?:tempt\w+|easy|easily|prone) to (?:WORD){1,4}?LIST",
        r"\btoo (?:ANY){1,4}?(?:to be|for|to count as|to call|to read as|to show|to suggest)"
        r" +(?:WORD){0,4}?LIST",
        # "although sad", "if he were angry", "sadness would …"
        r"(?<!as )(?<!even )\b(?:although|though|even though|even if|albeit|admittedly|granted)\b,?"
        rf"(?:(?!E){_TO_COMMA})*LIST",
        rf"(?:^|[.;!?\n]) *(?:while|whereas|whilst)\b(?:(?!E){_TO_COMMA})*LIST",
        rf"(?<!as )\b(?:if|whether|unless|had (?:he|she|it|this|the \w+) been)\b(?! (?:i|asked|forced"
        rf"|pressed|any|so)\b)(?:(?!\bthen\b){_TO_COMMA})*",
        rf"E{_MORE},?(?: +(?:on the other hand|by contrast|in contrast|however|itself|alone|also"
        rf"|typically|usually|normally|often),?)? +(?:would|should|ought|tends?|requires?|involves?"
        rf"|needs|calls for)\b[^.;!?\n]*",
        r"\b(?:would|should) (?:\w+ ){0,2}?(?:expect|require|need|involve|call for|demand|have to)"
        r"\b[^.,;!?\n]*",
        rf"\b(?:for|with|in|under) +LIST,? +(?:one|you|we|i) +(?:would|might|should|could)\b[^.;!?\n]*",
        # "the question mentions anger"
        rf"\b{_SPEAKER}\b(?: +(?!E)[\w']+){{0,3}}? +{_SAYS}(?: +(?!(?:{_STOPS})\b)[\w']+){{0,5}}?"
        r"[ :,(]*LIST(?: *, *LIST)*",
        r"\b(?:options|choices|categories|labels|classes|candidates|alternatives|possibilities"
        rf"|emotions)\b[^.!?\n:]*?[ :(]+E(?: *(?:,|/|;|\|)? *(?:or|and)? *(?:DET)?E)+",
        r"\bbetween\b[^.,;!?\n]*",
        rf"E +(?:is +|are +|can +)?(?:usually|typically|often|normally|commonly|generally)\b",
        r"E +(?:\w+ +)?(?:turn|chang|shift|fad|morph|transition|transform|evolv|develop)\w* +(?:in)?to"
        r" +(?!(?:NOUN){0,3}E)",
        r"\b(?:tr(?:ies|ied|ying)|attempt(?:s|ed|ing)?|want(?:s|ed|ing)?) to +(?:WORD){0,4}?LIST",
        rf"\b(?:suggest|hint|indicat|point|impl)\w* +(?:WORD){{0,6}}?E{_MORE}(?:(?!\b(?:but|yet)\b)"
        rf"{_CLAUSE})*(?=\b(?:but|yet|however)\b)",
        r"\b(?:among|from|of|either|out of|choos\w+|decid\w+) +(?:ANY){0,2}?E(?: *, *E)* *,?"
        r" +(?:and|or) +E(?= *[,;]? +(?:E|the|i|it|this|he|she|my)\b)",
        # "happy … no, wait"
        r"E *[,;.…!—-]* *(?:no,? wait|no[,;]|wait[,.;]|i mean|or rather|scratch that|correction"
        r"|make that|sorry,|hmm)",
        rf"\bwas +(?:WORD){{0,3}}?E{_MORE} +(?:before|earlier|previously|once|at first|initially)\b",
        rf"(?:(?!\b(?:but|yet)\b){_CLAUSE})*\b(?:at first|initially|originally|before|earlier)\b,?"
        r" *(?=(?:but|yet|however)\b)",
        r"\b(?:wrong|incorrect|mistake|inaccurate|misleading|error|premature|unfair|exaggerated) to"
        r" +(?:WORD){1,4}?LIST",
        r"\b(?:incorrect|wrong|false|not|excluded|rejected|ruled out|unlikely)(?: \w+)? *: *LIST",
        r"\b(?:second|third|fourth|fifth|runner-?up|followed by|next|alternatives?|alternatively"
        r"|another possibility|secondary)\b(?! (?:thought|look|glance|inspection))"
        r"(?: +(?!E)[\w'-]+){0,5}? *[:,]? *LIST",
        r"\b(?:masquerad\w+|disguis\w+|posing|dressed up) +as +(?:NOUN){0,2}?LIST",
        r"\b(?:beside|next to|opposite|in the background|the other|another|others)\b"
        rf"(?: +(?!E)[\w']+){{0,5}}? +(?:{_VERBS})(?: +[\w']+){{0,2}}? +LIST",
        rf"E{_MORE} +(?:hypothesis|theory|interpretation|reading|option|guess|idea)? *(?:fails|failed"
        r"|collapses|comes? to mind|springs? to mind|(?:gives?|gave|has given|have given) way)\b",
        r"E +(?:music|soundtrack|context|caption|title|scene|song|story|situation|word)\b",
        rf"E{_MORE} +by (?:others?|some|many|people)\b",
        rf"\b(?:word|term)s? +E{_MORE}",
        rf"E{_MORE} +has +(?:\w+ +){{0,2}}?(?:weaker|less|little|no)\b",
        r"[^.!?\n]*\?",  # a question
    )
]
_MINOR = [
    _pattern(text)
    for text in (
        r"\b(?:hints?|touch|traces?|tinge|undertones?|shades?|elements?|dash|flicker|glimmer|bit"
        r"|suggestion|pinch|note|underlying|mild|mildly|slight|slightly|subtle|subtly|faint"
        r"|faintly|minor|secondary|second|some|possibly|perhaps|maybe|potentially|possible|partly"
        r"|somewhat|a little|almost|nearly|bordering on|verging on|close to|similar to|akin to"
        r"|reminiscent of|resembl\w+|(?:may|might|could|can) also be) +(?:NOUN){0,3}?LIST",
        r"\b(?:may|might|could|can)\b +(?:also +)?(?:suggest|indicate|mean|signal|hint|imply|reflect"
        r"|point|convey|express|accompany|look like|be (?:an? |the )?(?:sign|seen as|interpreted|read"
        r"|construed|indicative|part))\b +(?:WORD){0,5}?LIST",
        rf"\b(?:often|usually|typically|commonly|generally|normally|sometimes|frequently)\b"
        rf" +(?:WORD){{0,7}}?LIST",
        r"\b(?:associated|linked|connected) with +(?:NOUN){0,4}?LIST",
        r"\bemotions? *,? +(?:like|such as|including) +LIST(?: *, *LIST)*",
        r"\b(?:such as|for example|for instance|including),? +(?:NOUN){0,2}?LIST",
        rf"\b(?:while|whereas)\b(?:(?!E){_TO_COMMA})*LIST",
    )
]
_KIND = (
    r"(?:emotions?|expressions?|feelings?|mood|state|impression|affect|labels?|answer|match|fit"
    r"|category|class|choice|option|description|candidate|guess|reading|interpretation|sentiment"
    r"|tone|classification|conclusion|verdict|prediction|one)"
)
_TOP = (
    r"(?:primary|dominant|main|predominant|prevailing|overall|strongest|most [a-z]+|best|closest"
    r"|principal|chief|core|central|leading|final|correct|right|likeliest)"
)
_BE = r"(?:is|was|would be|has to be|must be|seems to be|appears to be|remains|being|here is|=|:)"
_STRONG = [
    _pattern(text)
    for text in (
        rf"\b{_TOP} +(?:[\w']+ +){{0,2}}?{_KIND}\b(?: +(?!not\b)[\w']+){{0,6}}? *{_BE} +"
        r"(?:(?:that|of|likely|clearly|probably|one|indeed|therefore|thus|most) +){0,3}LIST",
        r"\b(?:the|my) answer (?:is|would be|:) *(?:(?:clearly|probably|likely|therefore) +)?LIST",
        r"\b(?:mostly|primarily|mainly|predominantly|chiefly|above all|ultimately|actually|really"
        r"|in fact|in reality|in truth|truly|most likely|most probably|more likely|best described"
        r" as|best classified as|best labell?ed|better described as|closest to),?"
        r" +(?:(?:the|person|face|he|she|they|man|woman|it|is|are|looks?|seems?|appears?|be|to|as|of"
        r"|a|an|feeling|showing|experiencing|expressing|one|in|very|quite|expression|emotion) +)"
        r"{0,6}LIST",
        rf"(?:^|[.;!?\n,]|\band|\bbut) *(?:therefore|thus|hence|so|overall|in (?:conclusion|summary"
        r"|short|sum)|to (?:sum up|conclude)|all in all|taken together|altogether|consequently"
        r"|as a result|in the end|on closer (?:inspection|look)|on balance|finally),?"
        rf" (?:(?!E)[^.;!?\n()]){{0,120}}LIST",
        r"\bi(?: would|'d| will|'ll| must)?(?: \w+)? (?:choose|pick|select|conclude|go with|opt for"
        r"|settle (?:on|for)|classify|label|categori[sz]e|say|answer|decide|vote)\b"
        r"(?: +(?!E)[\w',]+){0,9}? +LIST",
        rf"E{_MORE} +(?:(?:is|seems|appears|remains|looks|being|to be|clearly|still|the|by far|a|an"
        rf"|as|much|far) +)*(?:dominant|dominates|prevails|predominates|predominant|primary|main"
        r"|strongest|most \w+|best|more (?:likely|plausible|fitting|prominent|evident|apparent)"
        r"|better|closest|right|correct|likeliest|outweighs|wins|beats|(?:fits|suits|matches)"
        r" (?:\w+ )?(?:best|better))\b",
        r"\blean(?:s|ing)? (?:more )?(?:towards?|to) +LIST",
        r"(?:✓|✔|✅|☑|\[x\]) *E",
        r"^[^\w\ue000]*E[^\w\ue000]*?(?:[.!;]|\n|$)",  # the first sentence alone
        r"\n[^\w\ue000]*E[^\w\ue000]*$",  # the last line alone
    )
]
_CONTRAST = re.compile(
    r"\b(?:but|yet|however|still|mostly|mainly|primarily|predominantly|chiefly|outweighed|main"
    r"|primary|dominant)\b"
    r"|\bwith (?:(?:an?|some|perhaps|maybe|just|possibly|only|very) )*(?:hint|touch|trace|tinge|bit"
    r"|undertone|shade|element|slight|subtle|faint|mild|dash|flicker|glimmer|note)"
    r"|, *(?:possibly|perhaps|maybe|slightly|somewhat|a (?:little|bit|touch|hint))\b"
)
_FRAMED = _pattern(  # what counts beside a refusal
    r"(?:\b(?:he|she|they|it|this|person|man|woman|boy|girl|child|baby|individual|subject|face"
    r"|expression|emotion|people|guess|lady|guy|mood|features?|eyes|mouth|smile|brows?|i'd)\b"
    rf"|\b(?:but|however|still|guess|:))(?:(?!E){_CLAUSE}){{0,90}}LIST"
)
_TASK = (
    r"(?:identify|determin\w+|tell|infer|assess|analy[sz]\w+|recogni[sz]\w+|provid\w+|help|assist"
    r"|comment|classify|detect|discern|evaluat\w+|guess|speculate|judge|interpret|process|answer"
    r"|know|engage|support|describe|make|view|access|label|read|give|perform|fulfil\w*|comply)"
)
_REFUSAL = re.compile(
    rf"\b(?:i|we) (?:cannot|can't|can not|couldn't|could not|won't|will not|am unable to"
    rf"|am not (?:able|allowed|permitted) to|don't|do not)(?: \w+){{0,3}}? {_TASK}\b"
    rf"|\b(?:unable|not able|not allowed|not possible|impossible|not appropriate|not permitted"
    rf"|against my \w+) to (?:\w+ )?{_TASK}\b"
    r"|\b(?:i'm|i am|we're)(?: \w+)? (?:sorry|unable|not (?:able|comfortable))\b"
    r"|\b(?:cannot|can't|can not|could not) be (?:\w+ )?(?:determined|identified|inferred|recogni)"
    r"|\bas an? (?:ai|artificial|large language|language model|assistant)\b"
    r"|\b(?:sorry|i apologi[sz]e|my apologies)\b"
    r"|\bi (?:cannot|can't|can not|don't|do not) (?:see|find|detect) (?:an?|any|the) (?:\w+ )?"
    r"(?:image|picture|photo|face|video|person)"
)
_REFUSED = re.compile(
    rf"(?:{_REFUSAL.pattern})(?:(?!\b(?:but|however|though|although|yet|still)\b)[^.!?;\n])*"
)


def read_sentences(text: str, words: Mapping[str, str | None]) -> Sayings:
    """What a text says of emotions.

    Args:
        text: any.
        words: emotion words, casefolded → the class; None for an emotion that the set lacks.

    Returns:
        The mentions in the order of the text.
    """
    plain = _plain(text)
    names = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
    emotion = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")
    found: list[str] = []

    def sign(match: re.Match) -> str:
        found.append(match[0])
        return _SIGN

    plain = emotion.sub(sign, re.sub(_COURTESY, " ", plain))
    if "neutral" in words:
        plain, found = _add_neutral(plain, found)
    plain, bold = _take_bold(plain)
    plain = _IDIOMS.sub("", plain)
    refuses = _REFUSAL.search(plain) is not None
    plain = _REFUSED.sub(lambda match: match[0].replace(_SIGN, "\ue003"), plain)
    plain = re.sub(rf"\b(less\b(?: +[\w']+){{0,3}}? +{_SIGN} *,? +)than\b", r"\1but", plain)
    plain = re.sub(r"\bless(?= \w+ than\b)( \w+) than\b", r"less\1 but", plain)
    plain = re.sub(
        rf"({_SIGN}?)(?:\W\([a-h]\)|(?<!\w)\(?[a-h][).:]) *(?={_SIGN})",
        lambda match: f"{match[1]}, " if match[1] else " ",
        plain,
    )
    plain = re.sub(r" +", " ", plain)
    places = [n for n, letter in enumerate(plain) if letter in (_SIGN, "\ue003")]
    weights = _weigh(plain, places)
    listed = _listed(plain, places, [words.get(word) or word for word in found])
    for n, place in enumerate(places):
        if plain[place] == "\ue003":
            weights[n] = Weight.DENIED
        elif listed[n] and weights[n] < Weight.STRONG:
            weights[n] = Weight.DENIED
    bold_words = {words.get(found[n]) or found[n] for n in bold if weights[n] > Weight.MINOR}
    if len(bold_words) == 1:
        weights = [
            Weight.STRONG if n in bold and weight > Weight.MINOR else weight
            for n, weight in enumerate(weights)
        ]
    if refuses:
        framed = {n for match in _FRAMED.finditer(plain) for n in range(*match.span())}
        weights = [
            weight if weight == Weight.STRONG or place in framed and weight > Weight.MINOR
            else Weight.DENIED
            for weight, place in zip(weights, places, strict=True)
        ]
    mentions = tuple(
        Mention(word, words[word], weight, lies)
        for word, weight, lies in zip(found, weights, listed, strict=True)
    )
    return Sayings(mentions, _CONTRAST.search(plain) is not None, refuses)


def _plain(text: str) -> str:
    """Lower case, plain punctuation, without markup; bold words stay marked."""
    text = text.casefold()
    text = re.sub(r"~~.*?~~", " ", text)
    text = re.sub(r"\*\*([^*\n]{1,40})\*\*", rf"{_BOLD[0]}\1{_BOLD[1]}", text)
    for found, plain in (
        ("[’‘ʼ`´]", "'"),
        (r"[“”„\"«»*_#>]|(?<!\w)'|'(?!\w)", ""),
        (r"\be\.g\.,?", "such as"),
        (r"\bi\.e\.,?", "that is"),
        (r"\betc\.", "etc"),
        (r"\bvs\.", "vs"),
        (r"(\d)\.(\d)", r"\1·\2"),
        (r"\s*(?:[—–]|--+| - |->|→|⇒|\|)\s*", " ; "),
        (r"[^\S\n]+", " "),
        (r"\n\s*", "\n"),
    ):
        text = re.sub(found, plain, text)
    return text.strip()


def _add_neutral(plain: str, found: list[str]) -> tuple[str, list[str]]:
    """"Shows no emotion" is a mention of neutral, if a slight one."""
    pieces, words, start = [], [], 0
    left = list(found)
    for match in _NO_EMOTION.finditer(plain):
        before = plain[start : match.start()]
        words += [left.pop(0) for _ in range(before.count(_SIGN))]
        pieces += [before, f" perhaps {_SIGN} "]
        words.append("neutral")
        start = match.end()
    return "".join([*pieces, plain[start:]]), [*words, *left]


def _take_bold(plain: str) -> tuple[str, set[int]]:
    """The text without marks, and the numbers of the mentions that were bold."""
    bold, count, inside, kept = set(), 0, False, []
    for letter in plain:
        if letter in _BOLD:
            inside = letter == _BOLD[0]
            continue
        if letter == _SIGN:
            if inside:
                bold.add(count)
            count += 1
        kept.append(letter)
    return "".join(kept), bold


def _weigh(plain: str, places: list[int]) -> list[Weight]:
    """The weight of each mention: a denial beats all, then what is strong."""
    weights = dict.fromkeys(places, Weight.PLAIN)
    for weight, patterns in (
        (Weight.MINOR, _MINOR),
        (Weight.STRONG, _STRONG),
        (Weight.DENIED, _DENIED),
    ):
        for pattern in patterns:
            for match in pattern.finditer(plain):
                for place in range(*match.span()):
                    if place in weights:
                        weights[place] = weight
    return [weights[place] for place in places]


_ROW = re.compile(
    rf"{_SIGN}(?:(?: *[,/;|\n] *(?:\W?\w[).:] *)?(?:(?:and|or) +)?| +(?:and|or) +){_SIGN}){{2,}}"
)


def _listed(plain: str, places: list[int], labels: list[str]) -> list[bool]:
    """Which mentions are among three or more different ones in a row."""
    listed = [False] * len(places)
    for match in _ROW.finditer(plain):
        inside = [n for n, place in enumerate(places) if match.start() <= place < match.end()]
        if len({labels[n] for n in inside}) > 2:
            for n in inside:
                listed[n] = True
    return listed

"""The English of emotions: phrases that deny, play down or stress an emotion, and refusals.

Patterns are searched in one sentence at a time, in lower case, in which every emotion word is one
sign (`SIGN`). In a pattern, capitals stand for parts: `E` an emotion, `LIST` one or several ("fear,
anger or disgust"), `MORE` what continues a list, `WORD` a word of the same clause, `NOUN` a word of
a phrase without a verb, `ANY` any word, `DET` an article or its like, `STRETCH` any text up to the
next stop, comma or "but".
"""

import functools
import re

SIGN = "\ue000"

_STOPS = (
    r"but|and|rather|instead|however|although|though|while|whereas|because|since|then|which|who"
    r"|so(?! (?:much|far)\b)|yet|suggesting|indicating|showing|conveying|making|hence|therefore"
    r"|thus"
)
_PERSON = r"he|she|they|it|i|we|you|there|this"
_VERBS = (
    r"is|are|was|were|looks?|looked|seems?|seemed|appears?|appeared|has|have|shows?|showed|shown"
    r"|displays?|conveys?|conveyed|expresses|expressed|feels?|felt|suggests?|suggested|indicates?"
    r"|indicated|implies|reflects?|signals?|signalled|points?|means|gives|makes|reads|tells"
    r"|exhibits?|experiences"
)
_PARTS = {
    "LIST": "(?:DET){0,3}EMORE",
    # What "or" ties to an emotion, and lists that end in "and", "or", or in "other emotion".
    "MORE": r"(?: *(?:,? +(?:or|nor|and/or)|/) *(?:WORD){0,3}?E"
    r"| +and +(?:(?:an?|the|any|of|some) +){0,2}E)*"
    r"(?:(?: *, *(?:DET){0,3}E)+ *,? +(?:or|and|nor) +(?:DET){0,3}(?:E|other\b|anything\b))?"
    r"(?: *, *(?:or|nor) +(?:DET){0,3}E)?",
    "DET": r"(?:(?:an?|the|any|of|some|his|her|their|its|even|mild|slight|clear|strong|intense"
    r"|genuine|pure|extreme|signs?|hints?|traces?|either|both|feeling|being|looking|perhaps|very"
    r"|maybe|evident|obvious|visible|just|simply|only|more|to|be) +)",
    "WORD": rf"(?:(?!(?:{_STOPS})\b)[\w'/-]+ +)",
    "NOUN": rf"(?:(?!(?:{_STOPS}|{_PERSON}|{_VERBS})\b)[\w'/-]+ +)",
    "ANY": r"(?:[\w'/-]+ +)",
    "STRETCH": r"(?:(?!\b(?:but|yet|while)\b)[^.,;:!?()]){0,200}",
}
_BUT = r"\b(?:but|yet|however)\b"
_CLAUSE = r"(?:(?!\b(?:but|yet)\b)[^.;:!?()]){0,200}"


def pattern(text: str) -> re.Pattern:
    """A pattern in which capitals stand for parts."""
    for name in ("LIST", "MORE", "DET", "WORD", "NOUN", "ANY", "STRETCH"):
        text = text.replace(name, _PARTS[name])
    return re.compile(text.replace("E", SIGN))


# ---- what denies

_NOT = (  # the rest of its clause
    r"not|no|never|none|nor|neither|nothing|nobody|cannot|hardly|barely|scarcely|rarely|seldom"
    r"|non|[a-z]+n't|doubt(?:s|ed|ful|fully)?|unlikely|refus(?:es|ed) to|fail(?:s|ed)? to"
    r"|ceas(?:es|ed)|far from|anything but|impossible|unable|(?:hard|difficult) to \w+"
    r"|stop(?:s|ped)? (?:being|looking|feeling)"
)
_LACK = (
    r"lack of|absence of|without|lacking|lacks|free of|devoid of|minus"
    r"|(?:zero|few|little) (?:signs?|evidence|indications?|traces?) (?:of|for)"
)
_THAN = (  # the next phrase
    r"(?:everything|all|nearly all) (?:but|except)|rather than|instead of|in place of|in lieu of"
    r"|opposed to|in contrast (?:to|with)|contrary to|compared (?:to|with)|unlike|except(?: for)?"
    r"|besides|apart from|aside from|other than|excluding|exclud(?:es?|ed)"
    r"|differen(?:t|ce) (?:from|to|than)|distinct from|differs? from|opposite of|against"
    r"|less(?: like(?:ly)?| of)?|least(?: likely)?|more than|(?<!more )than|vs|versus|despite"
    r"|in spite of|regardless of|notwithstanding|if not|short of|no longer"
    r"|inconsistent with|incompatible with|at odds with|contradicts?|conflicts? with"
    r"|(?:rul|leav)(?:es?|ed|ing)(?: it| that)? out|(?<!be )(?<!is )considered|considering"
    r"|(?:dismiss|reject|discard|discount|disregard|forget|ignor|eliminat)(?:e?s|e|ed|ing)?"
    r"|(?:fak|feign|pretend|simulat)(?:e?s|e|ed|ing)?|supposed(?: to be)?|so-called|pseudo"
    r"|mimic(?:s|ked|king)?|mocks?|mocking|hid(?:es?|ing)|(?:mask|suppress|conceal)(?:e?s|ing|ed)?"
    r"|expected|expecting|never mind|far cry from|miles (?:away )?from|nothing like"
    r"|(?:would|could|might) have (?:been|said|guessed|answered|picked)"
    r"|going to (?:say|answer|pick)"
    r"|after (?:being|looking|feeling)|(?<!at )once|formerly|previously"
    r"|(?:scene|movie|film|story|song|article|talk) about"
    r"|(?:wins?|won|prevails?|dominates?|triumphs?) over"
    r"|(?:beat|outweigh|overrid|trump|overshadow|exceed)(?:s|es|ing)?"
)
_ABSENT = (  # what an emotion "is" then
    r"(?:\w+ +){0,2}?(?:not|never|no longer|nowhere|absent|missing|unlikely|improbable"
    r"|implausible|impossible|excluded|ruled out|rejected|eliminated|dismissed|wrong|incorrect"
    r"|false|out of|less|merely|only|just an?|a mistake|a misreading|an illusion|inaccurate"
    r"|low|minimal|imagined|dropped|discarded|unsuitable"
    r"|inappropriate|hardly|barely|lacking|too (?:strong|much|weak)|neither|negligible"
    r"|doubtful|no|off the table|weak(?:er)?|secondary|second|third|far-fetched|a distractor"
    r"|a (?:wrong|poor|bad|false|weak)|my (?:first|initial)|unconvincing|gone|over|outweighed"
    r"|overshadowed|dominated|overridden)\b"
)
_GLANCE = (
    r"\b(?:at|on|upon) (?:an? |the |a very )?(?:first|quick|passing|casual|brief|cursory|initial)"
    r" (?:glance|sight|look|view|impression|inspection)\b"
)
_SPEAKER = (  # who names an emotion without asserting it
    r"(?:question|prompt|user|you|options?|instructions?|captions?|text|titles?|labels?|shirt|sign"
    r"|poster|watermark|banner|file ?name|subtitles?|choices|list|annotat(?:ion|ors?)|raters?"
    r"|colleagues?|classifiers?|networks?|algorithms?|detectors?|task|note|words?)"
)
_SAYS = (
    r"(?:mention|ask|sa[iy]|suggest|list|nam|offer|includ|read|refer|propos|stat|assum|giv|contain"
    r"|claim|call|describ|hint|provid)\w*"
)
_DENIED = (
    # "not happy", "no sign of fear, or of anger", "not, in my view, sad"
    rf"(?<![\w'])(?:{_NOT})(?:,[^,.;:!?]{{2,30}},)?[ -]+(?:WORD){{0,7}}?"
    r"(?:(?:and|or|nor) +(?:NOUN){0,4}?)?LIST",
    rf"(?<![\w'])(?:{_LACK}) +(?:NOUN){{0,7}}?(?:(?:and|or|nor) +(?:NOUN){{0,4}}?)?LIST",
    # "rather than fear", "sadness over anger"
    rf"(?<![\w'])(?:{_THAN}) +(?:NOUN){{0,5}}?LIST",
    r"(?<=E) *,? *(?:over|more than|above) +(?:NOUN){0,2}?LIST",
    # "mistaken for fear", "tell fear from surprise"
    r"\b(?:mistak\w+|mistook|taken?|took|confus\w+|misread|mis\w+ed|confounded"
    r"|passe?d?s?(?: off)?) +(?:ANY){0,4}?(?:for|with|as|by) +(?:WORD){0,3}?LIST",
    r"\b(?:confus\w+|mistak\w+|tell|distinguish\w*|separat\w+|differentiat\w+|discriminat\w+)"
    r" +(?:ANY){0,4}?(?:from|apart|E)(?: +(?:ANY){0,3}?(?:from|for|with|and) +(?:ANY){0,2}?LIST)?",
    r"\b(?:masquerad\w+|disguis\w+|posing|dressed up) +as +(?:NOUN){0,2}?LIST",
    # "fear is ruled out", "anger can be excluded", "surprise does not fit", "happy: no"
    r"EMORE,?(?: +(?:itself|here|alone|too|also|either|though|however|as an?|at least"
    r"|in this (?:image|face|picture|case|photo)))*,? +(?:is|are|was|were|seems?|appears?"
    r"|looks?|can|could|may|might|must|should|has|have|had|would|remains?|gets?)(?: +be"
    rf"| +been)?(?: +(?:be|been|to))?(?:n't\b| +{_ABSENT})",
    r"EMORE,?(?: +(?:itself|here|alone|too|also|either|though|however))? +(?:(?:does|do|did|would"
    r"|can|could|has|is|are|was)(?:n't| +not)|cannot|can't|fails?|lacks?|needs?|requires?)\b",
    r"EMORE +(?:it|this|that) (?:is|was)(?:n't| not)\b",
    r"EMORE +being (?:the |an? )?(?:runner-?up|second|alternative|less|unlikely|weaker)\b",
    r"EMORE +(?:\w+ +){1,4}?(?:has|have|had) (?:vanished|disappeared|gone|passed|faded)\b",
    r"E +(?:person|man|woman|face|expression|smile|child|one) +(?:would|should|might)\b",
    r"\bnot (?:of|from|by|that of) (?:somebody|someone|an? \w+|the \w+) (?:who|that)(?: is| looks)?"
    r" +(?:WORD){0,3}?LIST",
    r"\b(?:a few|some|others?|few) (?:could|may|might) (?:\w+ ){0,3}(?:say|with|as|for) +LIST",
    r"\beither +(?:NOUN){0,2}?E(?= +or +(?:WORD){0,3}?(?!E)\w)",
    r"\b(?:went|goes|going|moves?|moved|switch\w*|shift\w*|chang\w+) from +(?:NOUN){0,2}?E"
    r"(?= +to +(?!(?:NOUN){0,3}E))",
    r"EMORE +has +(?:\w+ +){0,2}?(?:weaker|less|little|no)\b",
    r"EMORE +(?:hypothesis|theory|interpretation|reading|option|guess|idea)? *(?:fails|failed"
    r"|collapses|disappears?|vanish(?:es|ed)|subsides?|fades?|(?:comes?|springs?) to mind"
    r"|(?:gives?|gave|has given|have given) way)\b",
    r"E\)? *[:=(–-]+ *(?:very )?(?:no|false|absent|none|n/a|not \w+|low|weak|unlikely|minimal"
    r"|negligible|missing|✗|✘|❌)(?!\w)",
    r"E *; *(?:no|ruled out|excluded|rejected|absent|unlikely|incorrect|wrong|not \w+)"
    r"(?= *(?:[,;.!)]|$))",
    r"EMORE +(?:not (?:detected|present|found|visible|seen|shown)|undetected|excluded|absent"
    r"|missing|ruled out)\b",
    r"E\)? *[:=(]* *(?:0(?:·[0-4]\d*)?(?!\d|·|%)|[0-4]?\d(?:·\d+)? ?%|[0-4]/10\b)",
    r"(?<![\d·])[0-4]?\d(?:·\d+)? ?%(?: +(?:sure|confident|chance|probability|likelihood|it's|it is"
    r"|of|for|that))* +(?:DET)?E",
    r"^\W*?(?:✗|✘|❌|☐|\[ *\]|\( *\)) *E",
    r"(?:\[ *\]|\( +\)) *E",
    r"(?<![✗✘❌✓✔✅] )E *(?:✗|✘|❌)",
    r"\b(?:incorrect|wrong|false|not|excluded|rejected|ruled out|unlikely|absent|missing"
    r"|least likely|ground truth|true label|gt|reference)(?: \w+)? *: *LIST(?: *, *LIST)*",
    r"\b(?:wrong|incorrect|mistake|inaccurate|misleading|error|premature|unfair|exaggerated) to"
    r" +(?:WORD){1,4}?LIST",
    r"\b(?:tempt\w+|easy|easily|prone) to (?:WORD){1,4}?LIST",
    r"\btoo (?:ANY){1,4}?(?:to be|for|to count as|to call|to read as|to show|to suggest)"
    r" +(?:WORD){0,4}?LIST",
    r"\b(?:tr(?:ies|ied|ying)|attempt(?:s|ed|ing)?|want(?:s|ed|ing)?) to +(?:WORD){0,4}?LIST",
    # "at first glance sad", "what seems to be surprise", "was sad before", "sadness turns into …"
    rf"{_GLANCE},?STRETCH",
    rf"STRETCH{_GLANCE}",
    r"\b(?:on the surface|superficially|seemingly|ostensibly|(?:my |the )?(?:first|initial)"
    r" (?:impression|guess|thought|instinct)\w*)\b,?STRETCH",
    r"\bwhat (?:\w+ ){0,2}?(?:seem|appear|look|resembl|sound|pass|read|feel|might|may|could)\w*"
    r" (?:WORD){0,5}?LIST",
    r"\b(?:at first|initially|originally|earlier|previously|before|formerly|used to)\b"
    rf"{_CLAUSE}(?=\b(?:but|yet|however|actually)\b)",
    rf"{_CLAUSE}\b(?:at first|initially|originally|before|earlier)\b,? *(?={_BUT})",
    r"\bwas +(?:WORD){0,3}?EMORE +(?:before|earlier|previously|once|at first|initially)\b",
    r"E +(?:\w+ +)?(?:turn|chang|shift|fad|morph|transition|transform|evolv|develop)\w* +(?:in)?to"
    r" +(?!(?:NOUN){0,3}E)",
    # "might look like fear, but …", "the brows suggest fear, but …"
    rf"\b(?:might|may|could|can)\b{_CLAUSE}(?<!\w)EMORE{_CLAUSE}(?={_BUT}(?! (?:not|i am|i'm)\b))",
    rf"\b(?:suggest|hint|indicat|point|impl)\w* +(?:WORD){{0,6}}?EMORE{_CLAUSE}(?={_BUT})",
    # "I thought fear", "some would say anger"
    r"\b(?:thought|assumed|believed|guessed|suspected|expected|hoped|feared) +(?:WORD){0,5}?LIST",
    r"\b(?:some|others?|many|people|one|someone|observers?|viewers?|you|they) (?:people |\w+ )?"
    r"(?:might|may|could|would|will|can|tend to|often|say|think|see|call|claim|argue"
    r"|answer|guess|label)\b"
    r" *(?:WORD){0,6}?LIST",
    r"EMORE +by (?:others?|some|many|people)\b",
    r"\byou'd (?:think|say|expect|guess|believe) +(?:WORD){0,5}?LIST",
    r"\bto (?:an? |the )?(?:untrained|casual|inattentive|careless)\b[^.;!?]*",
    r"EMORE +(?:(?:might|could|would) have been|an? (?:moment|second|while|minute) ago|just now"
    r"|until recently)\b",
    r"\b(?:looks?|seems?|appears?) +(?:WORD){0,3}?EMORE[^.;:!?()]{0,60}\b(?:but|yet) +"
    r"(?:(?:he|she|it|they|the \w+) +)?(?:is|are|was)\b(?![^.!?]*E)",
    r"(?:^|[,;] *)(?:were|should) (?:he|she|it|they|the \w+)\b[^.,;!?]*",
    r"\b(?:supposing|imagine)\b[^.,;!?]*",
    r"\b(?:emoji|icon|sticker|logo) +(?:is|looks|shows)\b[^.,;!?]*",
    r"\bplay(?:s|ed|ing)? (?:an?|the) +(?:NOUN){0,2}?LIST",
    # "although sad", "if he were angry", "sadness would …"
    r"(?<!as )(?<!even )\b(?:although|though|even though|even if|albeit|admittedly|granted)\b,?"
    r"(?:(?!E)[^.,;:!?()]){0,200}LIST",
    r"(?:^|;) *(?:while|whereas|whilst)\b(?:(?!E)[^.,;:!?()]){0,200}LIST",
    r"(?<!as )\b(?:if|whether|unless|had (?:he|she|it|this|the \w+) been)\b(?! (?:i|asked|forced"
    r"|pressed|any|so)\b)(?:(?!\bthen\b)[^.,;:!?()]){0,200}",
    r"EMORE,?(?: +(?:on the other hand|by contrast|in contrast|however|itself|alone|also"
    r"|typically|usually|normally|often),?)? +(?:would|should|ought|tends?|requires?|involves?"
    r"|needs|calls for)\b[^.;!?]*",
    r"\b(?:would|should) (?:\w+ ){0,2}?(?:expect|require|need|involve|call for|demand|have to)"
    r"\b[^.,;!?]*",
    r"\b(?:for|with|in|under) +LIST,? +(?:one|you|we|i) +(?:would|might|should|could)\b[^.;!?]*",
    r"E +(?:is +|are +|can +)?(?:usually|typically|often|normally|commonly|generally)\b",
    # "the question mentions anger", "the options are …", "between fear and surprise"
    rf"\b{_SPEAKER}\b(?: +(?!E)[\w']+){{0,3}}? +{_SAYS}(?: +(?!(?:{_STOPS})\b)[\w']+){{0,5}}?"
    r"[ :,(]*LIST(?: *, *LIST)*",
    r"\b(?:options|choices|categories|labels|classes|candidates|alternatives|possibilities"
    r"|emotions)\b[^.!?:]{0,200}?[ :(]+E(?: *(?:,|/|;|\|)? *(?:or|and)? *(?:DET)?E)+",
    r"\bbetween\b[^.,;!?]*",
    r"\b(?:among|from|of|either|out of|choos\w+|decid\w+) +(?:ANY){0,2}?E(?: *, *E)* *,?"
    r" +(?:and|or) +E(?= *[,;]? +(?:E|the|i|it|this|he|she|my)\b)",
    r"\b(?:word|term)s? +EMORE",
    r"E +(?:music|soundtrack|context|caption|title|scene|song|story|situation|word)\b",
    # another person, another rank
    r"\b(?:beside|next to|opposite|in the background|the other|another|others)\b"
    rf"(?: +(?!E)[\w']+){{0,5}}? +(?:{_VERBS})(?: +[\w']+){{0,2}}? +LIST",
    r"\b(?:second|third|fourth|fifth|2nd|3rd|top-?[2-9]|runner-?up|followed by|next"
    r"|alternatives?|alternatively|another possibility|secondary)\b"
    r"(?! (?:thought|look|glance|inspection))"
    r"(?: +(?!E)[\w'-]+){0,5}? *[:,]? *LIST",
    r"^[^?]*\?",  # a question
)

# ---- what plays down, and what stresses

_MINOR = (
    r"\b(?:hints?|touch|traces?|tinge|undertones?|shades?|elements?|dash|flicker|glimmer|bit"
    r"|suggestion|pinch|note|underlying|mild|mildly|slight|slightly|subtle|subtly|faint"
    r"|faintly|minor|secondary|second|some|possibly|perhaps|maybe|potentially|possible|partly"
    r"|somewhat|a little|almost|nearly|border(?:s|ing) on|verg(?:es|ing) on|close to"
    r"|similar to|akin to|reminiscent of|resembl\w+|(?:may|might|could|can) also be)"
    r" +(?:NOUN){0,3}?LIST",
    r"\b(?:may|might|could|can)\b +(?:also +)?(?:suggest|indicate|mean|signal|hint|imply|reflect"
    r"|point|convey|express|accompany|look like|be (?:an? |the )?(?:sign|seen as|interpreted|read"
    r"|construed|indicative|part))\b +(?:WORD){0,5}?LIST",
    r"\b(?:often|usually|typically|commonly|generally|normally|sometimes|frequently)\b"
    r" +(?:WORD){0,7}?LIST",
    r"\b(?:associated|linked|connected) with +(?:NOUN){0,4}?LIST",
    r"\bemotions? *,? +(?:like|such as|including) +LIST(?: *, *LIST)*",
    r"\b(?:such as|for example|for instance|including),? +(?:NOUN){0,2}?LIST",
    r"\b(?:while|whereas)\b(?:(?!E)[^.,;:!?()]){0,200}LIST",
    # A part of the face is described: "the eyes are calm".
    r"\b(?:eye(?:s|brows?|lids?)?|brows?|forehead|gaze|nose|cheeks?|mouth|lips?|jaw|chin)"
    r" +(?:is|are|looks?|seems?|appears?|remains?)(?: +(?!E)[\w']+){0,2}? +LIST",
)
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
_STRONG = (
    rf"\b{_TOP} +(?:[\w']+ +){{0,2}}?{_KIND}\b(?: +(?!not\b)[\w']+){{0,6}}? *{_BE} +"
    r"(?:(?:that|of|likely|clearly|probably|one|indeed|therefore|thus|most) +){0,3}LIST",
    r"\b(?:the|my) answer (?:is|would be|:) *(?:(?:clearly|probably|likely|therefore) +)?LIST",
    r"(?:^|[.;]) *the (?:facial )?(?:expression|emotion) (?:is|is one of|is that of) +LIST",
    r"(?:^|[.;]) *the face (?:shows|expresses) +LIST",
    r"\b(?:mostly|primarily|mainly|predominantly|chiefly|above all|ultimately|actually|really"
    r"|in fact|in reality|in truth|truly|most likely|most probably|more likely|best described"
    r" as|best classified as|best labell?ed|better described as|closest to),?"
    r" +(?:(?:the|person|face|he|she|they|man|woman|it|is|are|looks?|seems?|appears?|be|to|as|of"
    r"|a|an|feeling|showing|experiencing|expressing|one|in|very|quite|expression|emotion) +)"
    r"{0,6}LIST",
    r"(?:^|[;,]|\band|\bbut) *(?:therefore|thus|hence|so|overall|in (?:conclusion|summary|short"
    r"|sum)|to (?:sum up|conclude)|all in all|taken together|altogether|consequently|as a result"
    r"|in the end|on closer (?:inspection|look)|on balance|finally),?"
    r" (?:(?!E)[^.;!?()]){0,120}LIST",
    r"\bi(?: would|'d| will|'ll| must)?(?: \w+)? (?:choose|pick|select|conclude|go with|opt for"
    r"|settle (?:on|for)|classify|label|categori[sz]e|say|answer|decide|vote)\b"
    r"(?: +(?!E)[\w',]+){0,9}? +LIST",
    r"\blean(?:s|ing)? (?:more )?(?:towards?|to) +LIST",
    r"EMORE +(?:(?:is|seems|appears|remains|looks|being|to be|clearly|still|the|by far|a|an"
    r"|as|much|far) +)*(?:dominant|dominates|prevails|predominates|predominant|primary|main"
    r"|strongest|most \w+|best|more (?:likely|plausible|fitting|prominent|evident|apparent)"
    r"|better|closest|right|correct|likeliest|outweighs|wins|beats|(?:fits|suits|matches)"
    r" (?:\w+ )?(?:best|better))\b",
    r"^\W*?(?:✓|✔|✅|☑|\[x\]) *E",
)


@functools.cache
def denied() -> tuple[re.Pattern, ...]:
    """What a sentence mentions, but denies or leaves open."""
    return tuple(map(pattern, _DENIED))


@functools.cache
def minor() -> tuple[re.Pattern, ...]:
    """What a sentence plays down."""
    return tuple(map(pattern, _MINOR))


@functools.cache
def strong() -> tuple[re.Pattern, ...]:
    """What a sentence gives as its answer."""
    return tuple(map(pattern, _STRONG))


# Between sentences: "happy … no, wait"; a first sentence or a last line that is one word.
WITHDRAWN = pattern(
    r"E[ ,;.…!—-]{0,10}(?:no,? wait|no[,;]|wait[,.;]|i mean|or rather|scratch that|correction"
    r"|make that|sorry,|hmm)"
)
AFFIRMED = pattern(  # "is the person sad? yes"
    r"(?<!\bnot )E[^.!?\nE]{0,60}\? *\n?(?: *a(?:nswer)?:)? *(?:yes|correct|true|right)\b"
    r"(?!,? (?:no|but)\b)"
)
ALONE = pattern(r"\A[^\wE]{0,20}E[^\wE]{0,20}?(?:[.!;]|\n|\Z)|\n[^\wE\n]{0,20}E[^\wE\n]{0,20}\Z")
TIED = pattern(r"(?=(E *,? *(?:(?:and/)?or|to|/) +(?:WORD){0,3}?E))")  # "sad or perhaps neutral"
# Three or more in a row: options, or a model that does not choose.
ROW = pattern(r"E(?:(?: *[,/;|\n] *(?:\W?\w[).:] *)?(?:(?:and|or) +)?| +(?:and|or) +)E){2,}")
# Beside these, what is only hinted at is no answer.
CONTRAST = re.compile(
    r"\b(?:but|yet|however|still|mostly|mainly|primarily|predominantly|chiefly|outweighed|main"
    r"|primary|dominant|probably|likely)\b"
    r"|\bwith (?:(?:an?|some|perhaps|maybe|just|possibly|only|very) )*(?:hint|touch|trace|tinge|bit"
    r"|undertone|shade|element|slight|subtle|faint|mild|dash|flicker|glimmer|note)"
    r"|, *(?:slightly|somewhat|a (?:little|bit|touch|hint))\b"
)

# ---- idioms, which are taken out

COURTESY = re.compile(  # that hold an emotion word
    r"\b(?:i'd|i would|i'm|i am|i'll|we're|we are|i will)(?: be)?(?: more than| very| so| always)?"
    r" (?:happy|glad|pleased|delighted) to\b"
    r"|\b(?:i'm|i am) afraid(?= (?:i|that|there|it|the|this|not|we|you)\b|,)"
    r"|\bi fear(?= (?:that|i)\b)|(?:^|(?<=[.!?\n] ))(?:sadly|happily),|\bhappy (?:birthday|new year"
    r"|holidays|hour|ending|to (?:help|assist))\b|\b(?:anger|fear) management\b|\bcalm down\b"
    r"|\b(?:sad|glad|sorry|happy) to say\b|\bhappy medium\b|\bto my surprise\b"
    r"|\b(?:wouldn't|would not|won't) be surprised (?:if|to)\b|\bmad (?:scientist|max)\b"
    r"|\bneutral(?= (?:\w+ )?(?:background|backdrop|colou?r|tones?\b|lighting|wall|position|setting"
    r"|cloth|palette|context|light\b))|\bblank(?= (?:\w+ )?(?:background|backdrop|wall|space))"
    r"|\b(?:calm|blank|neutral)(?= (?:brow|mouth|eyes?\b|lips?\b|stare|gaze|forehead|cheeks?))"
    r"|\banger(?= the brows?\b)"
)
IDIOM = pattern(  # that look like a denial
    r"\bnot (?:only|just|merely|simply|(?:\w+ )?(?:sure|certain|clear)(?! (?:if|whether|that)\b))"
    r"|\b(?:no|without(?: an?y?)?|beyond(?: any| an?)?)(?: \w+)? (?:doubt|question|hesitation)\b"
    r"|\b(?:cannot|can't|can not|couldn't|could not|doesn't|does not|hard to|impossible to"
    r"|unable to|hardly) (?:be )?(?:deny|denied|hide|hidden|conceal\w*|contain\w*|help|miss)\b"
    r"(?: but)?"
    r"|\bcould(?:n't| not) (?:be|look|seem|appear)(?: any)?(?: more)?\b"
    r"|\bnever (?:been|looked|seemed|felt)(?: so| more| this)?\b"
    r"|\b(?:nothing|none|no one|no other(?: \w+)?) (?:but|except|(?:other|less|short|else)"
    r" (?:than|of))|\bnot (?:to mention|least)\b|\bno wonder\b|\bif anything\b"
    r"|\b(?:is|are|be|looks?|seems?|appears?) more than(?= E)"
)
NO_EMOTION = re.compile(  # means neutral
    r"(?:\b(?:no|without(?: any)?|devoid of(?: any)?|absence of(?: any)?|lack(?:s|ing)?(?: of)?"
    r"(?: any)?)|(?:n't|\bnot|\bnever) (?:really )?(?:show|display|express|exhibit|convey|have)\w*"
    r" any)(?: (?:visible|particular|strong|specific|discernible|obvious|apparent|real|noticeable"
    r"|evident|facial|significant|distinct|overt|pronounced|observable))?"
    r" (?:emotions?|expressions?|feelings?)\b(?! (?:can|could|cannot|to be|is (?:given|listed)"
    r"|other|besides|except|label|recognition|such|like)\b)"
)

# ---- refusals

_TASK = (
    r"(?:identify|determin\w+|tell|infer|assess|analy[sz]\w+|recogni[sz]\w+|provid\w+|help|assist"
    r"|comment|classify|detect|discern|evaluat\w+|guess|speculate|judge|interpret|process|answer"
    r"|know|engage|support|describe|make|view|access|label|read|give|perform|fulfil\w*|comply)"
)
REFUSAL = re.compile(
    r"\b(?:i|we) (?:cannot|can't|can not|couldn't|could not|won't|will not|am unable to"
    rf"|am not (?:able|allowed|permitted) to|don't|do not)(?: \w+){{0,3}}? {_TASK}\b"
    r"|\b(?:unable|not able|not allowed|not possible|impossible|not appropriate|not permitted"
    rf"|against my \w+) to (?:\w+ )?{_TASK}\b"
    r"|\b(?:i'm|i am|we're)(?: \w+)? (?:sorry|unable|not (?:able|comfortable))\b"
    r"|\b(?:cannot|can't|can not|could not) be (?:\w+ )?(?:determined|identified|inferred|recogni)"
    r"|\bas an? (?:ai|artificial|large language|language model|assistant)\b"
    r"|\b(?:sorry|i apologi[sz]e|my apologies)\b"
    r"|\bi (?:cannot|can't|can not|don't|do not) (?:see|find|detect) (?:an?|any|the) (?:\w+ )?"
    r"(?:image|picture|photo|face|video|person)"
)
REFUSED = re.compile(  # with what it declines to name
    rf"(?:{REFUSAL.pattern})(?:(?!\b(?:but|however|though|although|yet|still)\b)[^.!?;\n])*"
)
FRAMED = pattern(  # an answer in spite of a refusal: "but he looks happy"
    r"(?:\b(?:he|she|they|it|this|person|man|woman|boy|girl|child|baby|individual|subject|face"
    r"|expression|emotion|people|guess|lady|guy|mood|features?|eyes|mouth|smile|brows?|i'd)\b"
    r"|\b(?:but|however|still|guess|:))(?:(?!E)[^.;:!?\n()]){0,90}LIST"
)

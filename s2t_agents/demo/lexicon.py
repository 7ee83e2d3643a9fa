"""The words of the demo world. Small on purpose: the demo pair copies known words and digits reliably, little else."""

from __future__ import annotations

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mia Tom Ana Ben Eva Leo Zoe Max Ida Sam Lea Jon Kim Ada Eli Noa Rui Uma Ravi Nina Omar Vera Hugo Lena Igor "
    "Maya Otto Yuki Sara Finn Alma Carl Dora Emil Gita Hana Ivan Juno Kofi Lars"
)
ITEMS = _words(
    "apples books pens stamps coins shells cards marbles pears plums eggs cakes roses lamps chairs cups bowls forks "
    "boxes bags hats socks shoes coats kites balls drums flags ropes bells keys nails bolts tiles bricks stones seeds "
    "nuts figs limes"
)
PLACES = _words(
    "Oslo Rome Paris Lima Cairo Delhi Tokyo Quito Dublin Madrid Vienna Prague Berlin London Boston Denver Austin "
    "Milan Turin Porto Seoul Hanoi Accra Tunis"
)
WORDS = _words(
    "red blue green gold pink grey dark light warm cold fast slow old new small big round flat north south east west "
    "river lake hill tree garden house door window table clock paper letter music dance bread milk water soup tea "
    "rain snow wind storm sun moon star cloud morning evening monday tuesday friday sunday call buy bring send read "
    "write clean open close meet visit"
)
LANGUAGES = _words("French German Spanish Italian Polish Greek Dutch Hindi Korean Turkish")

_SYLLABLES = _words("ba ce di fo gu ka le mi no pu ra se ti vo zu bel dor fin gam han kel lor mon nar pel sun tar vel")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FOREIGN = (
    "äöüßéèñçåøłžабвгдежклмнопрстуфхαβγδελμπσωあいうえおかきこさしすせそたちつてとなにのはまもらりるれわん"
    "アイウエオカキクサシスタテトナニハマラリルン가나다라마바사아자차서울한국"
)
_CJK = "你好世界天地山水火木金土日月星花草鸟鱼人大小上中下东西南北春夏秋冬红白青高学生公司集团市场商店汽车电话"

_SCRIPTS = (
    (0x4E00, 0x9FA5),  # CJK
    (0x4E00, 0x9FA5),
    (0x3041, 0x3093),  # hiragana
    (0x30A1, 0x30F3),  # katakana
    (0xAC00, 0xD7A3),  # hangul
    (0x0410, 0x044F),  # Cyrillic
    (0x1F600, 0x1F64F),  # faces
)
"""First and last code points of scripts to copy from."""


def made_up(rng: Random) -> str:
    """A pronounceable word which the lexicon does not hold."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))


def letters(rng: Random) -> str:
    """Two to five random letters."""
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 5)))


def characters(rng: Random) -> str:
    """Two to four CJK characters."""
    return "".join(rng.choice(_CJK) for _ in range(rng.randint(2, 4)))


def foreign(rng: Random) -> str:
    """One to eight characters of other scripts: CJK, kana, hangul, Cyrillic, Greek, accented Latin, emoji."""
    luck = rng.random()
    if luck < 0.3:
        return characters(rng)
    if luck < 0.6:  # any character of one script: no list of known ones helps here
        low, high = rng.choice(_SCRIPTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))
    return "".join(rng.choice(_FOREIGN) for _ in range(rng.randint(1, 6)))


def district(rng: Random) -> str:
    """A place as people write addresses: two words and a short code."""
    return f"{rng.choice(PLACES)} {rng.choice(WORDS).capitalize()}, {''.join(rng.choices(_LETTERS, k=2)).upper()}"


def span(rng: Random) -> str:
    """A short text to be copied: mostly known words, sometimes a made-up word, a name, a number or CJK characters."""
    luck = rng.random()
    if luck < 0.06:
        return foreign(rng)
    if luck < 0.12:
        return made_up(rng)
    words = rng.choices(WORDS, k=rng.randint(1, 4))
    if luck < 0.2:
        words[-1] = rng.choice(NAMES)
    elif luck < 0.28:
        words[-1] = str(rng.randint(2, 99))
    return " ".join(words)

"""Word lists the generators draw from. ``draw`` keeps the last tenth of a list for the test split, ``draw_many`` nothing.

The lists are short enough to be learned by heart, and then nothing is copied: so training also sees coined words.
"""

import random
from collections.abc import Sequence

from glm52.tasks.base import Split

NAMES = (
    "Anna Ben Carla David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nils Olga Paul Quinn Rosa Sven Tina Uwe Vera "
    "Walt Xenia Yusuf Zoe Amir Bella Chen Dora Emil Fatima George Hana Ivan Julia Kofi Lena Marco Nina Omar Petra Rafael "
    "Sara Tomas Ulla Viktor Wei Yara Zack Alice Boris Clara Diego Eva Frank"
).split()
SURNAMES = (
    "Smith Lopez Meyer Tanaka Novak Rossi Dubois Kim Silva Brown Ahmed Ivanov Larsen Costa Weber Moreau Sato Kaya Okafor "
    "Jensen Fischer Martin Garcia Singh Wang Berg Cohen Duarte Evans Fonda"
).split()
CITIES = (
    "Oslo Lisbon Berlin Paris Madrid Rome Vienna Prague Warsaw Athens Dublin London Tokyo Osaka Seoul Beijing Delhi Cairo "
    "Lagos Nairobi Toronto Boston Chicago Dallas Denver Lima Quito Bogota Santiago Sydney Perth Auckland Geneva Turin "
    "Porto Krakow Helsinki Bergen Malmo Graz"
).split()
JOBS = (
    "nurse teacher pilot baker lawyer farmer singer writer doctor engineer plumber painter driver chef dentist architect "
    "gardener librarian actor tailor"
).split()
NOUNS = (
    "apple book chair pencil stamp coin marble ticket bottle candle basket button shell stone ribbon lamp plate spoon towel "
    "hat glove scarf kite drum bell brick nail rope cup box card leaf seed egg plum pear lemon onion carrot potato muffin "
    "cookie toy ball puzzle magnet mirror"
).split()
WORDS = (
    "river mountain garden window silver yellow winter summer morning evening market bridge castle forest island harbor "
    "letter number question answer paper music picture story travel kitchen table floor wall roof street village city "
    "country ocean desert valley cloud thunder rain snow wind storm light shadow color shape circle square triangle line "
    "point corner engine wheel metal wood glass stone cotton paint water fire earth bread butter cheese sugar salt pepper "
    "honey coffee orange banana cherry grape melon tiger rabbit horse sheep eagle salmon spider monkey turtle dolphin "
    "camel panda zebra doctor soldier sailor farmer king queen child brother sister mother father friend teacher student"
).split()
# Onsets, vowels and ends of the syllables of coined words. A tokenizer cuts the rich ones as it cuts real names.
_SIMPLE = (tuple("bcdfghjklmnprstvwz"), tuple("aeiou"), ("", "", "n", "r", "l", "s"))
_RICH = (
    ("", "", *"bcdfghjklmnprstvwxyz", *"bl br ch cl cr dr fl fr gl gr kl kr ph pl pr qu sc sh sk sl sm sp st str th tr".split()),
    (*"aaeeiioouuy", *"ai ea ee ia ie io oa oi oo ou ua ue".split()),
    ("", "", "", *"bdgklmnprstvxz", *"ck ft ge go lf ll ld mp nd ng nk nt ra rn rt ss st th ve".split()),
)  # fmt: skip
COINED = 0.5  # how often training sees a coined word
COLORS = "red blue green yellow black white brown purple orange pink grey silver golden".split()


def draw(rng: random.Random, words: Sequence[str], split: Split = "train") -> str:
    """One word; the last tenth appears in the test split only (and makes half of it)."""
    kept = max(1, len(words) // 10)
    if split == "test" and rng.random() < 0.5:
        return rng.choice(words[-kept:])
    if split == "train" and rng.random() < COINED:
        return coined(rng, words[0][0].isupper())
    return rng.choice(words[:-kept])


def draw_many(rng: random.Random, words: Sequence[str], count: int, split: Split = "test") -> list[str]:
    """Distinct words, in random order; in the train split some of them coined."""
    drawn = rng.sample(list(words), count)
    if split == "train":
        drawn = [coined(rng, w[0].isupper()) if rng.random() < COINED else w for w in drawn]
    return list(dict.fromkeys(drawn))


def coined(rng: random.Random, is_name: bool) -> str:
    """A word that nobody knows: half of them of two to four simple syllables, half of one to three rich ones."""
    (onsets, vowels, ends), count = (_SIMPLE, rng.randint(2, 4)) if rng.random() < 0.5 else (_RICH, rng.randint(1, 3))
    word = "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(ends) for _ in range(count))
    return word.capitalize() if is_name else word


def nonsense(rng: random.Random, length: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))

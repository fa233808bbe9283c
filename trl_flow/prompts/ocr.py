# Copyright 2026 The trl-flow authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Prompts that ask for a text in the picture: signs, posters, labels and the like, with the text in double quotes."""

import random
import zlib
from collections.abc import Iterator
from itertools import islice

from datasets import Dataset


_ADJECTIVES = (
    *("Amber", "Ancient", "Blue", "Brave", "Bright", "Bronze", "Calm", "Clever", "Copper", "Crimson", "Crooked"),
    *("Curious", "Distant", "Early", "Electric", "Emerald", "Fearless", "Floating", "Forgotten", "Gentle", "Golden"),
    *("Happy", "Hidden", "Hollow", "Hungry", "Iron", "Jolly", "Last", "Little", "Lonely", "Lucky", "Merry"),
    *("Midnight", "Misty", "Nimble", "Noble", "Northern", "Painted", "Paper", "Patient", "Purple", "Quiet", "Rapid"),
    *("Royal", "Rusty", "Secret", "Shiny", "Silent", "Silver", "Sleepy", "Southern", "Swift", "Velvet", "Wandering"),
    *("Wild", "Winter", "Wooden"),
)
_NOUNS = (
    *("Acorn", "Anchor", "Badger", "Beacon", "Bear", "Bell", "Bicycle", "Bridge", "Button", "Candle", "Castle"),
    *("Cherry", "Clock", "Cloud", "Comet", "Compass", "Crow", "Dolphin", "Dragon", "Eagle", "Feather", "Fern"),
    *("Fiddle", "Forest", "Fox", "Garden", "Ginger", "Hammer", "Harbor", "Hare", "Heron", "Island", "Kettle"),
    *("Key", "Kite", "Ladder", "Lantern", "Lemon", "Lighthouse", "Lion", "Maple", "Mirror", "Moon", "Mountain"),
    *("Needle", "Oak", "Orchid", "Otter", "Owl", "Parrot", "Pepper", "Pigeon", "Pilot", "Pine", "Planet", "Pony"),
    *("Rabbit", "River", "Robin", "Rocket", "Rose", "Sailor", "Shadow", "Sparrow", "Spoon", "Star", "Stone"),
    *("Storm", "Swan", "Thistle", "Tiger", "Train", "Turtle", "Valley", "Violet", "Whale", "Willow", "Wolf"),
)
_TRADES = (
    *("Antiques", "Bakery", "Barber", "Bistro", "Books", "Brewery", "Cafe", "Cinema", "Coffee", "Diner", "Fabrics"),
    *("Florist", "Gallery", "Grocery", "Hotel", "Inn", "Kitchen", "Laundry", "Library", "Market", "Motel", "Music"),
    *("Optics", "Pharmacy", "Pizza", "Records", "Repairs", "Shoes", "Tailor", "Tavern", "Tea House", "Theater"),
    *("Tools", "Toys", "Travel"),
)
_GOODS = (
    *("apples", "bagels", "berries", "blankets", "books", "bread", "candles", "carpets", "cheese", "chocolate"),
    *("coats", "coffee", "cookies", "donuts", "eggs", "flowers", "fresh fish", "guitars", "hats", "honey"),
    *("ice cream", "jackets", "lamps", "lemonade", "muffins", "noodles", "oysters", "pancakes", "peaches", "pies"),
    *("plants", "pottery", "pumpkins", "records", "sandwiches", "seeds", "shoes", "soap", "soup", "strawberries"),
    *("tacos", "tea", "tomatoes", "toys", "umbrellas", "waffles", "watches", "wool"),
)
_PLACES = (
    *("airport", "beach", "bus stop", "campsite", "castle", "cathedral", "city hall", "dining room", "exit"),
    *("farm", "ferry", "fire station", "forest trail", "gate", "gym", "harbor", "hospital", "lake", "library"),
    *("lobby", "lookout", "market", "museum", "office", "old town", "parking", "platform", "playground", "pool"),
    *("post office", "reception", "ski lift", "stadium", "studio", "subway", "ticket office", "train station"),
    *("tunnel", "university", "viewpoint", "village", "waiting room", "waterfall", "workshop", "zoo"),
)
_FORBIDDEN = (
    *("bicycles", "camping", "climbing", "cooking", "dancing", "dogs", "diving", "drones", "entry", "fishing"),
    *("flash", "food", "horses", "jumping", "littering", "noise", "parking", "phones", "photos", "running"),
    *("shortcuts", "shouting", "skating", "smoking", "swimming", "talking", "tents", "trucks", "turning", "umbrellas"),
    *("visitors", "waiting", "whistling"),
)
_VERBS = (
    *("Ask", "Bake", "Begin", "Breathe", "Build", "Carry", "Chase", "Choose", "Climb", "Create", "Dance", "Dream"),
    *("Drive", "Explore", "Feed", "Find", "Follow", "Forgive", "Grow", "Imagine", "Keep", "Laugh", "Learn", "Listen"),
    *("Live", "Look", "Paint", "Plant", "Play", "Question", "Read", "Rest", "Run", "Save", "Share", "Sing", "Sleep"),
    *("Slow Down", "Smile", "Speak", "Start", "Swim", "Think", "Travel", "Trust", "Wait", "Walk", "Wander", "Write"),
)
_ADVERBS = (
    *("Again", "Alone", "Along", "Anyway", "Aloud", "Bravely", "Daily", "Deeper", "Differently", "Every Day"),
    *("First", "Forever", "Freely", "Gently", "Kindly", "Later", "Less", "Loudly", "More", "Now", "Often", "Outside"),
    *("Quietly", "Slowly", "Softly", "Today", "Together", "Tomorrow", "Twice", "Well", "Wisely"),
)
_NAMES = (
    *("Ada", "Anna", "Ben", "Carla", "Chen", "Clara", "Daniel", "Elif", "Emma", "Felix", "Frida", "Grace", "Hana"),
    *("Hugo", "Ida", "Ivan", "Jonas", "Julia", "Kofi", "Laura", "Leo", "Lina", "Lucas", "Maria", "Max", "Mia"),
    *("Miguel", "Nadia", "Nina", "Noah", "Olga", "Oscar", "Paula", "Pedro", "Priya", "Rosa", "Sam", "Sara", "Sven"),
    *("Tara", "Theo", "Uma", "Victor", "Yuki", "Zoe"),
)
_OCCASIONS = (
    *("Happy Birthday", "Congratulations", "Welcome Home", "Get Well Soon", "Thank You", "Good Luck", "Well Done"),
    *("We Miss You", "Good Morning", "Best Wishes", "See You Soon", "Bon Voyage"),
)

_LIGHTS = (
    *("at night", "at dawn", "at sunset", "in bright sunlight", "in soft morning light", "in dim light"),
    *("on a rainy day", "on a foggy day", "in winter", "in spring", "in autumn"),
)
_STYLES = (
    *("", "", "", "", ", photograph", ", close-up photograph", ", watercolor", ", oil painting", ", 3d render"),
    *(", comic style", ", vintage postcard", ", pencil drawing", ", film still", ", flat illustration"),
)
_LINKS = ("that says", "that reads", "with the text", "with the words", "on which is written", "showing the text")

# What such texts are found on.
_SHOPS = (
    *("a shop sign above a wooden door", "a neon sign in a narrow street", "a painted sign on a brick wall"),
    *("the window of a corner shop", "a striped awning over a shop", "a delivery van parked at the curb"),
    *("a sign on a small storefront", "a brass plate next to an entrance", "a hanging iron sign in an old town"),
)
_TITLES = (
    *("the cover of a hardcover book on a desk", "a movie poster in a glass frame", "a theater marquee"),
    *("the title page of an old atlas", "the cover of a magazine at a kiosk", "a vinyl record sleeve on a shelf"),
    *("the hull of a fishing boat", "a banner over a festival stage", "a tapestry in a great hall"),
)
_BOARDS = (
    *("a chalkboard outside a cafe", "a cardboard sign at a market stall", "a paper flyer on a lamp post"),
    *("a hand-painted board at a farm gate", "a price tag on a basket", "a menu on a wooden table"),
    *("a poster in a bakery window", "a sticker on a wooden crate"),
)
_SIGNS = (
    *("a road sign on a country lane", "a wooden signpost in a forest", "a metal sign on a fence"),
    *("an enamel sign on a station wall", "a lit sign in a long corridor", "a billboard beside a highway"),
    *("a sign at a trailhead in the mountains", "a stone marker by a path"),
)
_SLOGANS = (
    *("a T-shirt on a clothes line", "a mural on a concrete wall", "a coffee mug on a windowsill"),
    *("a tote bag on a chair", "a sticky note on a laptop", "a banner held by a cheerful crowd"),
    *(
        "a framed print above a sofa",
        "a sticker on a skateboard",
        "graffiti on a train car",
        "a message drawn in the sand",
    ),
)
_GREETINGS = (
    *("a birthday cake on a garden table", "a greeting card on a mantelpiece", "a banner across a living room"),
    *("a gift box with a paper tag", "a balloon tied to a chair", "a message on a frosted window"),
    *("icing on a tray of cookies", "a handwritten letter on a desk"),
)


def _shop(r: random.Random) -> str:
    name = f"{r.choice(_ADJECTIVES)} {r.choice(_NOUNS)}"
    return r.choice((f"The {name}", f"{name} {r.choice(_TRADES)}", f"{r.choice(_NAMES)}'s {r.choice(_TRADES)}"))


def _title(r: random.Random) -> str:
    adjective, noun, other = r.choice(_ADJECTIVES), *r.sample(_NOUNS, 2)
    return r.choice(
        (
            f"The {adjective} {noun}",
            f"{noun} and {other}",
            f"The {noun} of the {adjective} {other}",
            f"{r.choice(_NAMES)} and the {noun}",
            f"{adjective} {noun} {r.randint(2, 2099)}",
        )
    )


def _board(r: random.Random) -> str:
    goods = r.choice(_GOODS)
    price = f"{r.randint(1, 19)}.{r.choice(('00', '25', '50', '75', '99'))}"
    return r.choice(
        (
            f"{goods} ${price}",
            f"{r.randint(1, 14) * 5}% off {goods}",
            f"Fresh {goods} every {r.choice(('Monday', 'Tuesday', 'Friday', 'Sunday', 'morning'))}",
            f"{goods} and {r.choice(_GOODS)}",
            f"Sold out of {goods}",
        )
    )


def _sign(r: random.Random) -> str:
    place = r.choice(_PLACES)
    return r.choice(
        (
            f"No {r.choice(_FORBIDDEN)}",
            f"No {r.choice(_FORBIDDEN)} in the {place}",
            f"{place} {r.randint(1, 99)} km",
            f"Welcome to {r.choice(_ADJECTIVES)} {r.choice(_NOUNS)}",
            f"{place} {r.choice('ABCDEFGH')}{r.randint(1, 40)}",
            f"{place} closed until {r.randint(1, 12)} {r.choice(('am', 'pm'))}",
        )
    )


def _slogan(r: random.Random) -> str:
    verb, other = r.sample(_VERBS, 2)
    return r.choice(
        (
            f"{verb} {r.choice(_ADVERBS)}",
            f"{verb} more, {other.lower()} less",
            f"{verb} the {r.choice(_NOUNS)}",
            f"{verb}, {other.lower()}, {r.choice(_VERBS).lower()}",
        )
    )


def _greeting(r: random.Random) -> str:
    return f"{r.choice(_OCCASIONS)} {r.choice(_NAMES)}{r.choice(('', '!'))}"


_KINDS = (
    (_shop, _SHOPS),
    (_title, _TITLES),
    (_board, _BOARDS),
    (_sign, _SIGNS),
    (_slogan, _SLOGANS),
    (_greeting, _GREETINGS),
)
_HELD_OUT_SHARE = 6  # one text in six is for testing


def _is_held_out(text: str) -> bool:
    """Of which split a text is, whatever its case, spaces and marks: no variant of one is on the other side."""
    letters = "".join(character for character in text.lower() if character.isalnum())
    return zlib.crc32(letters.encode()) % _HELD_OUT_SHARE == 0


def _rows(split: str, seed: int) -> Iterator[dict]:
    """Different prompts without end."""
    r, seen = random.Random(f"OCR {split} {seed}"), set()
    while True:
        write, surfaces = r.choice(_KINDS)
        target = write(r)
        target = r.choice((target, target[0].upper() + target[1:], target.upper()))
        surface, link, light, style = (r.choice(words) for words in (surfaces, _LINKS, _LIGHTS, _STYLES))
        prompt = f'{surface} {link} "{target}", {light}{style}'
        if _is_held_out(target) == (split == "test") and prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "target": target}


def ocr_dataset(split: str = "train", num_prompts: int | None = None, seed: int = 0) -> Dataset:
    """
    Prompts that ask for a text in the picture, which they have in double quotes, for the reward `ocr`: "a neon sign in a
    narrow street that says "The Silver Fox", in the rain". Flow-GRPO has a task of this kind; these prompts are our own,
    from a grammar of names, titles, offers, signs, slogans and greetings.

    One text in six is held out for `"test"` and never asked for in `"train"`, in no other case, spacing or punctuation
    either.

    Args:
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"test"`.
        num_prompts (`int`, *optional*): Number of rows; 6,000 of `"train"` and 1,000 of `"test"` if not given.
        seed (`int`, *optional*, defaults to `0`): Chooses the training prompts. Those of the test split are always the
            same.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt` and `target`, the text; no prompt occurs twice.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: the prompt set 'ocr' has the splits 'train' and 'test'.")
    if num_prompts is None:
        num_prompts = 6000 if split == "train" else 1000
    if num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts}: expected at least 1.")
    return Dataset.from_list(list(islice(_rows(split, seed if split == "train" else 0), num_prompts)))

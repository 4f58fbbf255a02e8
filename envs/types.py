"""Types of settings that say which numbers make sense: `check_args` in settings.py refuses others."""

import math
from collections.abc import Callable
from typing import Annotated

BOUNDS: dict[str, Callable[[float], bool]] = {
    "positive": lambda x: 0 < x < math.inf,
    "positive or 0": lambda x: 0 <= x < math.inf,
    "from 0 to 1": lambda x: 0 <= x <= 1,
}
PositiveInt = Annotated[int, "positive"]
NonNegativeInt = Annotated[int, "positive or 0"]
PositiveFloat = Annotated[float, "positive"]
NonNegativeFloat = Annotated[float, "positive or 0"]
UnitFloat = Annotated[float, "from 0 to 1"]

"""Colours of methods and how figures look, the same in all of them."""

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from bench.methods import METHODS
from bench.statistics import BLIND

# Okabe and Ito's palette, told apart with any kind of colour vision
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
)
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
GREY = "#808080"
MAX_CURVES = len(CYCLE)  # in one pair of axes
STYLE = {  # for matplotlib.rc_context
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "savefig.dpi": 130,
}


def color_of(method: str) -> str:
    """One colour per method in every figure; a variant by flags has that of its method."""
    return METHODS[method].color if method in METHODS else GREY


def line_of(method: str) -> str:
    """Dashed for a variant by flags, dotted for the task-blind control."""
    if method == BLIND:
        return ":"
    return "--" if method in METHODS and METHODS[method].variant else "-"


def label_steps(ax: Axes) -> None:
    """The axis of environment steps."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("environment steps, all tasks together")

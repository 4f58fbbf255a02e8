"""Names and colours of methods, and how figures look, the same in all of them."""

from bench.statistics import BLIND

# Okabe and Ito's palette, told apart with any kind of colour vision
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
)
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
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
TITLES = {
    BLIND: "Task-blind",
    "varshare": "VarShare",
    "varshare-recentred": "VarShare, re-centred",
    "l2soft": "L2Soft",
    "l2soft-recentred": "L2Soft, re-centred",
    "independent": "Independent",
    "hard-sharing": "Hard sharing",
    "contextual": "Contextual",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "varshare-ppo": "VarShare-PPO",
    "varshare-sac": "VarShare-SAC",
}


def color_of(method: str) -> str:
    """One colour per method in every figure; those with residuals have one also."""
    order = ["varshare", "independent", "hard-sharing", "contextual", "pcgrad", "cagrad"]
    order += ["l2soft", "varshare-recentred"]
    colors = dict(zip(order, (BLUE, BLACK, ORANGE, PURPLE, GREEN, RED, SKY, YELLOW)))
    colors |= {"varshare-ppo": BLUE, "varshare-sac": ORANGE}  # which are in no figure with the others
    return colors.get(method, "0.5")

"""Films of a policy: an episode of every task, one by one and side by side, as MP4 and as GIF."""

from __future__ import annotations

import ctypes.util
import math
import os
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import RescaleAction
from torch import Tensor

from envs import make_single
from envs.evaluation import MAX_STEPS, greedy
from envs.settings import fail
from envs.vector import SUCCESS

try:
    import imageio_ffmpeg
    from PIL import Image, ImageDraw, ImageFont, ImageOps
except ImportError as error:  # training needs neither, so they are not part of every installation
    fail(f"films need Pillow and imageio-ffmpeg ({error}): pip install -e '.[video]'")

MAX_FRAMES = 400  # of a film, an even number; the longer the episode, the fewer of its steps are shown
FRAMES_PER_SECOND = 25  # at most
LAST_FRAME = 1500  # ms
WIDTH = 480  # of a film of one task, pixels; in the film of all tasks it is half of that
COLUMNS = 5  # tasks in a row of that film
FONT = 22  # pixels

Policy = Callable[[Tensor], Tensor]  # observations (task, env, obs) -> what `greedy` takes
Reel = namedtuple("Reel", "tiles duration total")  # frames, ms of each, and the episode's return


def draw_without_screen() -> None:
    """Let environments draw where there is no screen; to be called before they are made.

    MuJoCo chooses how it draws when it is imported. Asked for EGL where there is none it fails, so this is
    for films only.
    """
    os.environ |= {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not screen and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def open_stages(env_id: str, tasks: Sequence[int]) -> list[gym.Env]:
    """An environment to film for each of these tasks of `envs.make_single`; Box actions are in [-1, 1].

    Raises:
        ValueError: as `make_single`, or if the environment cannot be filmed.
    """
    draw_without_screen()
    stages = [make_single(env_id, task, "rgb_array") for task in tasks]
    if any("rgb_array" not in stage.metadata.get("render_modes", ()) for stage in stages):
        raise ValueError(f"{env_id} cannot be filmed: it has no render mode rgb_array")
    stages[0].reset(seed=0)
    try:  # now, and not at the end of a long run
        picture = stages[0].render()
    except Exception as error:  # whatever is missing to draw with
        hint = " (where there is no display MuJoCo needs EGL)" if "mujoco" in sys.modules else ""
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(f"{env_id} cannot be filmed here: {reason}{hint}") from error
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{env_id} cannot be filmed: render() gives no picture but {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        found = f"{list(picture.shape)} {picture.dtype}"
        raise ValueError(f"{env_id} cannot be filmed: render() gives {found}, not (height, width, 3) uint8")
    return [in_policy_units(stage) for stage in stages]


def in_policy_units(stage: gym.Env) -> gym.Env:
    """The environment with bounded Box actions from -1 to 1, as those of `envs.make` have them."""
    space = stage.action_space
    if not isinstance(space, Box) or not space.is_bounded():
        return stage
    if (space.low == -1).all() and (space.high == 1).all():
        return stage
    ones = np.ones(space.shape, space.dtype)  # of its dtype, else Gymnasium warns
    return RescaleAction(stage, -ones, ones)


def draw_tile(picture: np.ndarray, name: str, status: str) -> Image.Image:
    """A picture (height, width, 3) under two lines of text; half of its size is even, as H.264 needs it."""
    image = Image.fromarray(picture)
    height = 4 * round(image.height * WIDTH / image.width / 4)
    framed = ImageOps.expand(image.resize((WIDTH, height)), (0, 60, 0, 0), "white")
    draw, font = ImageDraw.Draw(framed), ImageFont.load_default(FONT)
    draw.text((8, 2), name, "black", font)
    draw.text((8, 30), status, "black", font)
    draw.rectangle((0, 0, framed.width - 1, framed.height - 1), outline="lightgrey", width=2)
    return framed


def record(act: Callable[[np.ndarray], Any], stage: gym.Env, name: str, seed: int) -> Reel:
    """Film one episode, cut after as many steps as its environment is registered with."""
    obs, _ = stage.reset(seed=seed)
    limit = stage.spec.max_episode_steps or MAX_STEPS
    fps = stage.metadata.get("render_fps") or 30
    skip = math.ceil(fps / FRAMES_PER_SECOND)
    tiles, step, total, outcome, over = [], 0, 0.0, "", False

    def shoot() -> Image.Image:
        status = f"step {step}{' (end)' * over}   return {total:.1f}{outcome}"
        return draw_tile(stage.render(), name, status)

    while not over:
        if step % skip == 0:
            tiles.append(shoot())
        if len(tiles) > MAX_FRAMES:
            tiles, skip = tiles[::2], skip * 2
        obs, reward, terminated, truncated, info = stage.step(act(obs))
        step, total = step + 1, total + float(reward)
        for success in (info[x] for x in SUCCESS if x in info):
            outcome = "   success" if success else "   no success"
        over = terminated or truncated or step >= limit
    return Reel([*tiles, shoot()], 1000 * skip / fps, total)


@torch.no_grad()
def film(
    policy: Policy, stages: list[gym.Env], names: Sequence[str], seeds: Sequence[int], folder: Path
) -> tuple[list[Path], np.ndarray]:
    """Film an episode of every task: NAME.mp4 and NAME.gif, and several tasks side by side in all-tasks.*.

    Args:
        policy: of these tasks, in this order.
        stages: their environments, from `open_stages`.
        names, seeds: of the tasks, and of the episodes.
        folder: where the films go.

    Returns:
        The paths of the MP4s, and the returns (task,).
    """
    folder.mkdir(parents=True, exist_ok=True)
    *stems, sheet = file_names([*names, "all-tasks"])
    small_reels, totals = [], []
    for i, stage in enumerate(stages):

        def act(obs: np.ndarray, i: int = i, space: gym.Space = stage.action_space) -> int | np.ndarray:
            of_all = torch.zeros(len(stages), 1, len(obs))  # which the policy takes
            of_all[i, 0] = torch.as_tensor(obs)
            action = greedy(policy(of_all)[i, 0], space)
            return action.cpu().numpy() if isinstance(space, Box) else action.item()

        reel = record(act, stage, names[i], seeds[i])
        save_film(folder / stems[i], [(tile,) for tile in reel.tiles], reel.duration)
        halves = [tile.reduce(2).quantize(256, Image.Quantize.FASTOCTREE) for tile in reel.tiles]
        small_reels.append(reel._replace(tiles=halves))
        totals.append(reel.total)
    if len(stages) > 1:
        stems.append(sheet)
        save_film(folder / sheet, *in_step(small_reels))
    return [folder / f"{stem}.mp4" for stem in stems], np.array(totals)


def film_agent(
    agent: torch.nn.Module, stages: list[gym.Env], names: Sequence[str], seeds: Sequence[int], folder: Path
) -> list[Path]:
    """`film` with an agent's mean weights; the paths of the MP4s."""
    W, device = agent.unpack(agent.weights().detach()), next(agent.parameters()).device
    return film(lambda obs: agent.policy(W, obs.to(device)), stages, names, seeds, folder)[0]


def file_names(names: Sequence[str]) -> list[str]:
    """A file's name for each of these tasks; no two are the same, even if case does not count."""
    stems: list[str] = []
    for name in names:
        stem = plain = re.sub(r"[^\w.+-]", "-", name)[:60]  # a file system takes 255 bytes
        number = 1
        while stem.lower() in [other.lower() for other in stems]:
            number += 1
            stem = f"{plain}-{number}"
        stems.append(stem)
    return stems


def in_step(reels: list[Reel]) -> tuple[list[tuple[Image.Image, ...]], float]:
    """Tiles of all tasks at each time, and ms of a frame; who is over stands still."""
    duration = max(reel.duration for reel in reels)  # others have a frame 2, 4, ... times as often
    thinned = [[*tiles[: -1 : round(duration / ms)], tiles[-1]] for tiles, ms, _ in reels]
    longest = max(map(len, thinned))
    return list(zip(*([*tiles, *tiles[-1:] * (longest - len(tiles))] for tiles in thinned))), duration


def side_by_side(tiles: tuple[Image.Image, ...]) -> Image.Image:
    """Tiles in rows."""
    columns, width, height = min(COLUMNS, len(tiles)), tiles[0].width, max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(tiles) / columns)), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def save_film(path: Path, shots: list[tuple[Image.Image, ...]], duration: float) -> None:
    """Write an MP4 and a GIF whose frames are tiles side by side; the path has no suffix."""
    size = side_by_side(shots[0]).size
    mp4 = imageio_ffmpeg.write_frames(f"{path}.mp4", size, fps=1000 / duration, quality=7, macro_block_size=2)
    mp4.send(None)
    for shot in [*shots, *shots[-1:] * round(LAST_FRAME / duration)]:
        mp4.send(side_by_side(shot).tobytes())
    mp4.close()
    # all frames of a GIF in one palette: that of a mosaic of some of them
    some = [np.asarray(side_by_side(shot)) for shot in shots[:: math.ceil(len(shots) / 8)]]
    palette = Image.fromarray(np.concatenate(some)).quantize(64, Image.Quantize.FASTOCTREE)
    frames = (side_by_side(shot).quantize(palette=palette, dither=Image.Dither.NONE) for shot in shots)
    times = [duration] * (len(shots) - 1) + [LAST_FRAME]
    next(frames).save(f"{path}.gif", save_all=True, append_images=frames, duration=times, loop=0)

"""Films of a policy: an episode of every task, one by one and side by side, as GIFs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from envs import make_single
from envs.evaluation import greedy

MAX_FRAMES = 400  # of a film; the longer the episode, the fewer of its steps are shown
FRAMES_PER_SECOND = 25  # at most
COLUMNS, WIDTH = 5, 240  # tiles in a row of the film of all tasks, and a tile's pixels


def open_stages(env_id: str, tasks: Sequence[int]) -> list[gym.Env]:
    """An environment to film for each of these tasks of `envs.make_single`.

    Raises:
        ValueError: as `make_single`, or if the environment cannot be filmed.
    """
    os.environ |= {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}  # films need no screen, no sound
    stages = [make_single(env_id, task, "rgb_array") for task in tasks]
    if any("rgb_array" not in stage.metadata["render_modes"] for stage in stages):
        raise ValueError(f"{env_id} cannot be filmed: it has no render mode rgb_array")
    stages[0].reset(seed=0)
    try:  # now, and not at the end of a long run
        stages[0].render()
    except Exception as error:  # whatever is missing to draw with
        hint = " (where there is no display MuJoCo needs MUJOCO_GL=egl)" if "mujoco" in sys.modules else ""
        raise ValueError(f"{env_id} cannot be filmed here: {error}{hint}") from error
    return stages


def caption(tile: Image.Image, name: str, total: float, over: bool) -> Image.Image:
    """A tile with a line above it: the task and its running return."""
    font, text = ImageFont.load_default(12), f"ended with {total:.0f}" if over else f"{total:.0f}"
    framed = ImageOps.expand(tile, (0, 18, 0, 0), "white")
    draw = ImageDraw.Draw(framed)
    draw.text((4, 2), name, "black", font)
    left = tile.width - 4 - font.getlength(text)
    draw.rectangle((left - 6, 0, tile.width, 17), "white")
    draw.text((left, 2), text, "grey" if over else "black", font)
    draw.rectangle((0, 0, framed.width - 1, framed.height - 1), outline="lightgrey")
    return framed.quantize(256, Image.Quantize.FASTOCTREE)


@torch.no_grad()
def record(
    policy: Callable[[Tensor], Tensor], stages: list[gym.Env], names: list[str], seeds: list[int]
) -> tuple[list[list[Image.Image]], float, np.ndarray]:
    """Play one episode of every task, all at once: tiles [task][frame], ms per frame, and returns (task,)."""
    obs = np.stack([stage.reset(seed=seed)[0] for stage, seed in zip(stages, seeds)]).astype(np.float32)
    totals, over = np.zeros(len(stages)), np.zeros(len(stages), dtype=bool)
    width = WIDTH * 2 if len(stages) == 1 else WIDTH
    reels: list[list[Image.Image]] = [[] for _ in stages]
    fps = stages[0].metadata.get("render_fps", 30)
    step, skip, closed = 0, math.ceil(fps / FRAMES_PER_SECOND), over  # closed: the end is in the reel
    while not closed.all():
        if step % skip == 0 or over.all():
            for i, (stage, reel) in enumerate(zip(stages, reels)):
                if closed[i]:
                    reel.append(reel[-1])
                    continue
                image = Image.fromarray(stage.render())
                image = image.resize((width, round(image.height * width / image.width)))
                reel.append(caption(image, names[i], totals[i], over[i]))
            closed = over.copy()
            if len(reels[0]) > MAX_FRAMES:
                reels, skip = [reel[::2] for reel in reels], skip * 2
        policies = policy(torch.from_numpy(obs).unsqueeze(1)).squeeze(1)
        actions = greedy(policies, stages[0].action_space).cpu().numpy()
        for i in np.flatnonzero(~over):
            obs[i], reward, terminated, truncated, _ = stages[i].step(actions[i])
            totals[i] += reward
            over[i] = terminated or truncated
        step += 1
    return reels, 1000 * skip / fps, totals


def film(
    agent: torch.nn.Module, stages: list[gym.Env], names: list[str], seeds: list[int], folder: Path
) -> list[Path]:
    """Film an episode of every task, with an agent's mean weights; returns the films' paths."""
    W, device = agent.unpack(agent.weights().detach()), next(agent.parameters()).device
    reels, duration, _ = record(lambda obs: agent.policy(W, obs.to(device)), stages, names, seeds)
    return save_films(folder, names, reels, duration)


def side_by_side(tiles: tuple[Image.Image, ...]) -> Image.Image:
    """The tiles of all tasks at one time, in rows."""
    columns, (width, height) = min(COLUMNS, len(tiles)), tiles[0].size
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(tiles) / columns)), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def save_gif(path: Path, shots: list[tuple[Image.Image, ...]], duration: float) -> None:
    """Write a GIF whose frames are tiles side by side, in one palette: that of a mosaic of some of them."""
    some = [np.asarray(side_by_side(shot)) for shot in shots[:: math.ceil(len(shots) / 8)]]
    palette = Image.fromarray(np.concatenate(some)).quantize(64, Image.Quantize.FASTOCTREE)
    frames = (side_by_side(shot).quantize(palette=palette, dither=Image.Dither.NONE) for shot in shots)
    times = [duration] * (len(shots) - 1) + [1500]
    next(frames).save(path, save_all=True, append_images=frames, duration=times, loop=0)


def save_films(folder: Path, names: list[str], reels: list[list[Image.Image]], duration: float) -> list[Path]:
    """One GIF per task and one of all tasks; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names, films = [name.replace("/", "-") for name in names], {}
    for name, reel in zip(names, reels):
        repeated = sum(tile is reel[-1] for tile in reel) - 1  # while others were still playing
        films[name] = [(tile,) for tile in reel[: len(reel) - repeated]]
    if len(reels) > 1:
        films["all-tasks"] = list(zip(*reels))
    for name, shots in films.items():
        save_gif(folder / f"{name}.gif", shots, duration)
    return [folder / f"{name}.gif" for name in films]

"""Films: what is shown, for how long, under which names, and what cannot be filmed."""

from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import probes
import pytest
import torch
from PIL import Image

import enjoy
from envs import runs, video

varshare = probes.load_script("varshare_ppo.py")
PICTURE = np.full((30, 50, 3), 200, np.uint8)


class Screen(gym.Env):
    """An environment without an end whose observation is the number of steps; `rendered` is what it draws."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(np.float32([-4, -2]), np.float32([8, 2]))
    rendered, success = PICTURE, None

    def __init__(self, render_mode=None):
        self.render_mode, self.actions = render_mode, []

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1), {}

    def step(self, action):
        self.steps += 1
        assert self.steps < 100  # so that a film without an end fails
        self.actions.append(action)
        info = {} if self.success is None else {"is_success": self.steps >= self.success}
        return np.full(1, self.steps), 0.5, False, False, info

    def render(self):
        return self.rendered


class NoPicture(Screen):
    rendered = None


class ListOfPictures(Screen):
    rendered = [PICTURE]


class Grey(Screen):
    rendered = PICTURE[:, :, 0]


class Floats(Screen):
    rendered = PICTURE / 255


class NoModes(Screen):
    metadata = {}


for env in (Screen, *Screen.__subclasses__()):
    gym.register(env.__name__, env)
gym.register("Screen20", Screen, max_episode_steps=20)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("NoPicture", "gives no picture but NoneType"),
        ("ListOfPictures", "gives no picture but list"),
        ("Grey", r"gives \[30, 50\] uint8, not \(height, width, 3\) uint8"),
        ("Floats", r"gives \[30, 50, 3\] float64, not"),
        ("NoModes", "has no render mode rgb_array"),
    ],
)
def test_what_gives_no_picture_is_refused(env_id, message):
    with pytest.raises(ValueError, match=f"^{env_id} cannot be filmed: .*{message}"):
        video.open_stages(env_id, [0])


@pytest.mark.usefixtures("elsewhere")
def test_what_gives_no_picture_is_refused_before_training(capsys):
    with pytest.raises((SystemExit, ValueError)):
        probes.main(varshare, "--env-id", "NoPicture", "--capture-video")
    assert "Traceback" not in capsys.readouterr().err and not list(Path().iterdir())


@pytest.fixture
def shown(monkeypatch):
    """The lines under the name in each frame."""
    lines, draw_tile = [], video.draw_tile

    def draw(picture, name, status):
        lines.append(status)
        return draw_tile(picture, name, status)

    monkeypatch.setattr(video, "draw_tile", draw)
    return lines


def film(stages, folder, names=("a", "b", "c")):
    """Of a policy that goes half of the way to one bound and beyond the other."""
    policy = torch.tensor([0.5, -100.0]).expand(len(stages), 1, 2)
    return video.film(lambda obs: policy, stages, names[: len(stages)], range(len(stages)), folder)


def test_a_frame_shows_step_return_and_success_and_actions_are_in_the_environments_units(tmp_path, shown):
    stages = video.open_stages("Screen20", [0])
    stages[0].unwrapped.success = 15
    paths, totals = film(stages, tmp_path)
    assert paths == [tmp_path / "a.mp4"] and totals == [10]
    expected = [f"step {t}   return {t / 2:.1f}" for t in range(20)] + ["step 20 (end)   return 10.0"]
    outcomes = ["", *["   no success"] * 14, *["   success"] * 6]
    assert shown == [line + outcome for line, outcome in zip(expected, outcomes)]
    np.testing.assert_allclose(stages[0].unwrapped.actions, [[5, -2]] * 20)
    frames = imageio_ffmpeg.read_frames(str(paths[0]))
    meta = next(frames)
    assert meta["source_size"] == (video.WIDTH, 348) and meta["fps"] == 5 and meta["codec"] == "h264"
    assert len(list(frames)) == 21 + 8  # the last stays for a while
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.size, image.n_frames, image.info["duration"]) == (meta["source_size"], 21, 200)
        image.seek(20)
        assert image.info["duration"] == 1500


def test_an_episode_without_an_end_is_cut_and_of_a_long_one_fewer_steps_are_shown(
    tmp_path, shown, monkeypatch
):
    monkeypatch.setattr(video, "MAX_STEPS", 30)
    monkeypatch.setattr(video, "MAX_FRAMES", 10)
    assert film(video.open_stages("Screen", [0]), tmp_path)[1] == [15]
    assert shown[-1].startswith("step 30 (end)")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["duration"]) == (9, 800)  # steps 0, 4, ..., 28, and 30


def test_tasks_side_by_side_keep_step_with_each_other(tmp_path, monkeypatch):
    long, short = video.Reel([0, 2, 4, 6, 7], 400, 0.0), video.Reel([0, 1, 2, 3, 3.5], 200, 0.0)
    assert video.in_step([long, short]) == ([(0, 0), (2, 2), (4, 3.5), (6, 3.5), (7, 3.5)], 400)
    monkeypatch.setattr(video, "MAX_FRAMES", 10)
    stages = [video.open_stages(env_id, [0])[0] for env_id in ("Screen20", "Screen")]
    monkeypatch.setattr(video, "MAX_STEPS", 5)
    paths, totals = film(stages, tmp_path, names=("all-tasks", "b"))
    assert totals.tolist() == [10, 2.5]
    assert [path.stem for path in paths] == ["all-tasks", "b", "all-tasks-2"]
    frames = imageio_ffmpeg.read_frames(str(paths[2]))
    assert next(frames)["source_size"] == (video.WIDTH, 174)
    with Image.open(tmp_path / "all-tasks-2.gif") as image:
        assert (image.n_frames, image.info["duration"]) == (11, 400)


def test_names_of_files_are_plain_and_never_the_same():
    names = ["a/b", "a-b", "A b", "x.1_+", "..", "ü:*?", "a-b-2"]
    assert video.file_names(names) == ["a-b", "a-b-2", "A-b-3", "x.1_+", "..", "ü---", "a-b-2-2"]


@pytest.mark.parametrize(
    ("display", "egl", "before", "after"),
    [
        ("", "libEGL.so.1", None, "egl"),
        ("", "libEGL.so.1", "osmesa", "osmesa"),
        (":0", "libEGL.so.1", None, None),
        ("", None, None, None),
    ],
)
def test_mujoco_draws_with_egl_where_there_is_no_screen(monkeypatch, display, egl, before, after):
    environment = {"DISPLAY": display} | ({"MUJOCO_GL": before} if before else {})
    monkeypatch.setattr(video.os, "environ", environment)
    monkeypatch.setattr(video.sys, "platform", "linux")
    monkeypatch.setattr(video.ctypes.util, "find_library", lambda name: egl)
    video.draw_without_screen()
    assert environment.get("MUJOCO_GL") == after and environment["SDL_VIDEODRIVER"] == "dummy"


@pytest.mark.parametrize("filmed", [True, False])
def test_only_for_a_film_and_before_environments_are_made_it_is_chosen_how_to_draw(monkeypatch, filmed):
    calls = []

    def make(*_):
        calls.append("make")
        raise InterruptedError

    monkeypatch.setattr(video, "draw_without_screen", lambda: calls.append("draw"))
    for module in (runs, enjoy):
        monkeypatch.setattr(module, "make", make)
        calls.clear()
        with pytest.raises(InterruptedError):
            if module is runs:
                varshare.train(varshare.Args(capture_video=filmed))
            else:
                enjoy.play(enjoy.Args(probes.ROOT / "models/goals10", capture_video=filmed))
        assert calls == ["draw"] * filmed + ["make"]

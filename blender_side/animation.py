"""Stepping through a scene's frames, with signals before and after each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bpy

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.notes import INSTANCE_VARIABLE

from . import bootstrap, compat, simulations
from .signal import Signal

#: With a window, stepping takes this many times as long as Blender needed for its own redraw, up to the given limit,
#: and then lets it redraw again. So the interface stays alive and costs at most a quarter of the time while a redraw
#: takes less than a third of a second.
_STEPPING_PER_REDRAW = 3.0
_LONGEST_STEPPING_S = 1.0

_playing: set[AnimationController] = set()


@dataclass
class _Run:
    """Where one call of `play` stands."""

    frame_range: tuple[int, int] | None
    num_episodes: int
    use_physics: bool
    scene: Any
    frames: tuple[int, int] = (0, 0)
    episode: int = 0
    at_first: bool = True


class AnimationController:
    """Plays a range of frames again and again; user code takes part through six signals.

    For every call of `play`::

        pre_play
            for each episode:
                pre_animation                       before the first frame, whose number is set: change the scene, show another in
                                                    the window, or open a file
                    for each frame of the range:
                        pre_frame                   the frame number is set, the scene not yet evaluated: change it here
                        post_frame                  the scene is evaluated: render and publish here
                post_animation                      after the last frame
        post_play

    Each episode simulates anew, from the scene as it is after `pre_animation` and the first `pre_frame`; only what was baked is
    replayed. The scene's frame step counts: with 2, every other frame is played.

    With a window, `play` returns at once and frames are stepped from Blender's event loop, so its interface stays
    alive. Blender's own playback operator is not used: it redraws the whole interface once per frame (3.4 on software
    OpenGL: 350 ms) and never exceeds the scene's frame rate, stops at a press of Escape, and swallows exceptions. In
    background, `play` steps the frames itself and returns after the last one.

    An exception in a signal's handler is never swallowed: it leaves `play`, or, raised from the event loop, is
    printed and ends an instance that a launcher started with exit code 1. Such an instance also ends, with exit code
    0, when it has played its last episode; a Blender that was opened by hand stays open.
    """

    def __init__(self) -> None:
        self.pre_play = Signal()
        self.pre_animation = Signal()
        self.pre_frame = Signal()
        self.post_frame = Signal()
        self.post_animation = Signal()
        self.post_play = Signal()
        self._run: _Run | None = None

    @property
    def frameid(self) -> int:
        """Number of the current frame."""
        return int(bpy.context.scene.frame_current)

    def play(
        self,
        frame_range: tuple[int, int] | None = None,
        num_episodes: int = -1,
        use_animation: bool = True,
        use_offline_render: bool = True,
        use_physics: bool = True,
    ) -> None:
        """Play the frames of a range.

        Args:
            frame_range: first and last frame, both played. None: the scene's own range, or its preview range while that is on.
            num_episodes: how often to play the range, -1: forever.
            use_animation: with a window, return at once and step from Blender's event loop. False: step here, with a
                window too.
            use_offline_render: kept for scripts written for blendtorch. Rendering in `post_frame` is always safe here.
            use_physics: simulate anew in each episode, over exactly these frames, and frames between that the frame step leaves
                out. False: what is simulated, and what is left of earlier simulations, is Blender's business.

        Raises:
            ConfigurationError: the range ends before it starts or starts before frame 0, or this controller is already playing.
        """
        if self._run is not None:
            raise ConfigurationError(
                "This AnimationController is already playing: use a second one, or wait for post_play."
            )
        self._run = _Run(frame_range, num_episodes, use_physics, bpy.context.scene)
        self._run.frames = self.setup_frame_range(frame_range, physics=use_physics)
        try:
            self.pre_play.invoke()
            if use_animation and compat.HAS_WINDOW:
                self._play_in_event_loop()
            else:
                for _ in self._frames():
                    pass
        except BaseException:
            self._run = None
            raise

    def rewind(self) -> None:
        """Make the next frame the first of the range, starting the episode anew. The one cut short is not counted."""
        if self._run is not None:
            self._run.at_first = True

    @staticmethod
    def setup_frame_range(frame_range: tuple[int, int] | None, physics: bool = True) -> tuple[int, int]:
        """Give the scene, and what it simulates, a range of frames.

        Args:
            frame_range: first and last frame. None: the scene's own range, or its preview range while that is on.
            physics: let rigid bodies, cloth, soft bodies, particles, dynamic paint and fluids be simulated over exactly this
                range, each instance for itself: not with a cache on disk that instances of one file would share. What was
                baked stays.

        Returns:
            first and last frame.

        Raises:
            ConfigurationError: the range ends before it starts, or starts before frame 0.
        """
        scene = bpy.context.scene
        if frame_range is not None:
            first, last = frame_range
        elif scene.use_preview_range:
            first, last = scene.frame_preview_start, scene.frame_preview_end
        else:
            first, last = scene.frame_start, scene.frame_end
        if last < first:
            raise ConfigurationError(f"frame_range ({first}, {last}) ends before it starts.")
        if first < 0:
            raise ConfigurationError(
                f"frame_range ({first}, {last}) starts before frame 0, where no scene's range does: nothing would be simulated"
                " there. Move the animation."
            )
        scene.frame_start, scene.frame_end = first, last
        if physics:
            simulations.limit(scene, first, last)
        return first, last

    def _frames(self) -> Iterator[int]:
        """Play one frame per iteration, to the end of the last episode.

        User code runs while Blender is not about to change the frame itself, as in its handlers: so it may open a file.
        """
        run = self._run
        assert run is not None
        frame = run.frames[0]
        while run.episode != run.num_episodes:
            is_first, run.at_first = run.at_first, False
            self._find_scene(run)
            frame = run.frames[0] if is_first else self._step(run, frame)
            run.scene.frame_current = frame  # which evaluates nothing
            if is_first:
                self.pre_animation.invoke()
                if self._find_scene(run):
                    frame = run.scene.frame_current = run.frames[0]
            self.pre_frame.invoke()
            if self._find_scene(run):
                run.scene.frame_current = frame
            if is_first and run.use_physics:
                simulations.forget(run.scene)
            run.scene.frame_set(frame)
            self.post_frame.invoke()
            self._find_scene(run)
            if frame + run.scene.frame_step > run.frames[1] and not run.at_first:
                self.post_animation.invoke()
                run.episode += 1
                run.at_first = True
            bootstrap.recycle_if_due()  # here no frame is lost that somebody has begun to make
            yield frame
        self._run = None
        self.post_play.invoke()

    @staticmethod
    def _step(run: _Run, frame: int) -> int:
        """The next frame after `frame`, with what is between simulated."""
        following = frame + int(run.scene.frame_step)
        for between in range(frame + 1, following) if run.use_physics else ():
            run.scene.frame_set(between)
        return following

    def _find_scene(self, run: _Run) -> bool:
        """Go on in the scene that the window shows now, if that is another: a handler has chosen it, or opened a file, or undone.

        Returns:
            whether it is another.

        Raises:
            ConfigurationError: Blender has told nobody but the window.
        """
        if run.scene == bpy.context.scene:
            windows = bpy.context.window_manager.windows
            if bpy.context.window is None and windows and run.scene not in [window.scene for window in windows]:
                raise ConfigurationError(
                    f"The window shows the scene {windows[0].scene.name!r}, but this script works in {run.scene.name!r}: Blender"
                    f" {bpy.app.version_string} has given it no window. Show another scene within bpy.context.temp_override("
                    "window=bpy.context.window_manager.windows[0]), and play there with use_animation=False."
                )
            return False
        run.scene = bpy.context.scene
        run.frames = self.setup_frame_range(run.frame_range, physics=run.use_physics)
        return True

    def _play_in_event_loop(self) -> None:
        """Step frames from a timer that Blender calls between two redraws."""
        frames = self._frames()
        yielded_at = time.perf_counter()

        def step() -> float | None:
            nonlocal yielded_at
            started = time.perf_counter()
            budget = min(_STEPPING_PER_REDRAW * (started - yielded_at), _LONGEST_STEPPING_S)
            try:
                for _ in frames:
                    yielded_at = time.perf_counter()
                    if yielded_at - started >= budget:
                        return 0.0
            except BaseException as error:
                self._leave_event_loop(error)
                raise
            self._leave_event_loop(None)
            return None

        _playing.add(self)
        bpy.app.timers.register(step, persistent=True)  # it goes on when a file is opened

    def _leave_event_loop(self, error: BaseException | None) -> None:
        """Forget this run, and end a launched instance that has nothing else to do."""
        self._run = None
        _playing.discard(self)
        if INSTANCE_VARIABLE not in os.environ:  # somebody at a desk opened this Blender
            return
        if error is not None:
            bootstrap.leave(bootstrap.exit_code_of(error))
        if not _playing:
            bootstrap.leave(0)

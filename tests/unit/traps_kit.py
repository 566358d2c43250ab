"""Stories about the classic traps of a replicated lock manager (dlm.md 6.8), each with the way back into its trap.

    trap = Traps()

    @trap(_shown_at_once)                      # what somebody might do who does not know of it
    def test_..._trap_1() -> None: ...         # passes as the code stands

    test_a_story_fails_with_its_trap_put_back = trap.test()

The number of a trap ends the name of its test. `docs/lock-manager.md` lists all forty.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

Story = Callable[[], None]
PutBack = Callable[[pytest.MonkeyPatch], None]


class Traps:
    """The stories of one file."""

    def __init__(self) -> None:
        self._all: list[tuple[Story, PutBack]] = []

    def __call__(self, put_back: PutBack) -> Callable[[Story], Story]:
        def add(story: Story) -> Story:
            self._all.append((story, put_back))
            return story

        return add

    def test(self) -> Callable[[Story, PutBack, pytest.MonkeyPatch], None]:
        """A test of all of them with their traps put back: each must fail."""

        @pytest.mark.parametrize(
            ("story", "put_back"), self._all, ids=[story.__name__ for story, _ in self._all]
        )
        def fails(story: Story, put_back: PutBack, monkeypatch: pytest.MonkeyPatch) -> None:
            put_back(monkeypatch)
            with pytest.raises(AssertionError):
                story()

        return fails

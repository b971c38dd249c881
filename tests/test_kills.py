"""Real processes, really killed: what is on disk is the old state or the new one, and a fit goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # where the processes find it too
import killed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a system that kills and forks")


def test_a_fit_that_is_killed_goes_on_bit_for_bit(tmp_path) -> None:
    found = killed.kill_fits(tmp_path, 10, seed=0)
    assert found["kills"] >= 10
    assert found["fits that came to their end, bit for bit equal"] >= 1


@pytest.mark.parametrize(
    ("work", "which"), [(killed.save_again, killed.which_is_saved), (killed.embed, killed.which_is_embedded)]
)
def test_a_file_that_is_being_written_is_the_old_one_or_the_new_one(tmp_path, work, which) -> None:
    found = killed.kill_writers(work, which, tmp_path, 5, seed=1)
    assert found["kills"] == 5

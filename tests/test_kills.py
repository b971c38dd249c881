"""Real processes, really killed: what is on disk is the old state or the new one, and a fit goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # where the processes find it too
import killed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a system that kills and forks")


def test_a_fit_that_is_killed_goes_on_bit_for_bit(tmp_path) -> None:
    found = killed.kill_goers_on(killed.fit, killed.steps_on_disk, killed.result_of_fit, tmp_path, 10, seed=0)
    assert found["kills"] == 10
    assert found["came to their end, bit for bit equal"] >= 1


def test_an_embedding_that_is_killed_goes_on_and_loses_nothing(tmp_path) -> None:
    work = killed.embed, killed.cells_on_disk, killed.result_of_embedding
    assert killed.kill_goers_on(*work, tmp_path, 5, seed=1)["kills"] == 5


@pytest.mark.parametrize(
    ("work", "which"), [(killed.save_again, killed.which_is_saved), (killed.write_again, killed.which_is_written)]
)
def test_a_file_that_is_being_written_is_the_old_one_or_the_new_one(tmp_path, work, which) -> None:
    assert killed.kill_writers(work, which, tmp_path, 3, seed=2)["kills"] == 3

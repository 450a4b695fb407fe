"""Every dataset of the study behind one fixture hub: what `cpt-rft data` and the notebook need to run offline."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image as PillowImage

from cpt_rft.data.drop import Drop
from cpt_rft.data.example import Example, Split
from cpt_rft.tasks.base import TASK_FILES, Task, load_task
from tests.helpers.hub import sets
from tests.helpers.hub.client import connect
from tests.helpers.hub.server import Hub


def study_hub() -> Hub:
    """A hub with every repository, and VizWiz's archives on its plain site."""
    hub = Hub(*(make() for make in sets.ALL.values()))
    hub.site = {f"/site/{name}": content for name, content in sets.vizwiz_site().items()}
    return hub


@dataclass(frozen=True)
class Study:
    """A running hub, this process pointed at it, and task files that know its site."""

    hub: Hub
    place: Path

    def task(self, name: str, **changes: object) -> Task:
        """The task of a file, with some keys of its configuration replaced."""
        task = load_task(self.place / "tasks" / f"{name}.yaml")
        task.config = task.config.model_copy(update=changes)
        return task

    def rows(self, name: str, split: Split, **changes: object) -> list[Example | Drop]:
        """The rows of a split."""
        task = self.task(name, **changes)
        return list(task.rows(split, task.source(self.place / "cache")))

    def task_of(self, text: str) -> Task:
        """The task of a file of this text."""
        path = self.place / "task.yaml"
        path.write_text(text, encoding="utf-8")
        return load_task(path)


@contextmanager
def running_study(place: Path) -> Iterator[Study]:
    """The hub with every dataset, for as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch, study_hub() as hub:
        connect(hub, place / "home", patch)
        write_task_files(hub, place / "tasks", write_pictures(place / "pictures"))
        yield Study(hub, place)


def used(rows: Sequence[Example | Drop]) -> list[Example]:
    """The rows that are used."""
    return [row for row in rows if isinstance(row, Example)]


def dropped(rows: Sequence[Example | Drop]) -> Counter[str]:
    """How many rows are dropped for which reason."""
    return Counter(str(row.reason) for row in rows if isinstance(row, Drop))


def write_pictures(folder: Path, number: int = 40) -> Path:
    """A folder of photographs for jigsaws, in two levels."""
    for i in range(number):
        path = folder / f"part{i % 2}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sets.picture(7000 + i, (96, 93), "JPEG")["bytes"])
    return folder


def write_task_files(hub: Hub, folder: Path, pictures: Path | None = None) -> Path:
    """Copies of configs/tasks in which a site and a folder are those of the tests; hub names stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in TASK_FILES.glob("*.yaml"):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        if task["reader"] == "vizwiz":
            site = f"{hub.endpoint}/site"
            task["options"] = {"annotations_url": f"{site}/Annotations.zip", "images_url": f"{site}/train.zip"}
        if task["reader"] == "jigsaw" and pictures is not None:
            task["options"]["folder"] = str(pictures)
        (folder / path.name).write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return folder


def write_broken_pictures(folder: Path, outside: Path) -> None:
    """Files that are no usable pictures, and links: out of the folder, and to nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.png").write_text("no picture")
    (folder / "cut.jpg").write_bytes(sets.picture(1, (96, 96), "JPEG")["bytes"][:300])
    (folder / "labels.txt").write_text("not counted: no picture by its name")
    PillowImage.new("RGB", (20, 90)).save(folder / "narrow.png")
    outside.write_bytes(sets.picture(2, (96, 96))["bytes"])
    (folder / "link.png").symlink_to(outside)
    (folder / "nowhere.png").symlink_to(folder / "missing.png")

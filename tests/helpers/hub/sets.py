"""Small repositories with the columns, feature types, splits and quirks of the real ones, drawn from a seed."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as PillowImage

from tests.helpers.hub.server import Repo, parquet_repo

Row = dict[str, Any]
TEXT = Value("string")


def picture(number: int, size: tuple[int, int] = (48, 36), form: str = "PNG", mode: str = "RGB") -> Row:
    """A picture of its own for every number, as an image cell."""
    rng = random.Random(number)
    image = PillowImage.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    for _ in range(6):
        corner = rng.randrange(size[0] - 8), rng.randrange(size[1] - 8)
        image.paste(tuple(rng.randrange(256) for _ in range(3)), (*corner, corner[0] + 8, corner[1] + 8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form)
    return {"bytes": buffer.getvalue(), "path": f"{number}.{form.lower()}"}


def parquet(rows: Sequence[Row], features: Features, row_group: int = 7) -> bytes:
    """Parquet bytes as ``push_to_hub`` writes them: feature types in the schema's metadata."""
    table = datasets.Dataset.from_list(list(rows), features=features).data.table
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group)
    return buffer.getvalue()


def repo(name: str, configs: dict[str, tuple[Features, dict[str, list[Row]]]], shards: int = 2) -> Repo:
    """A parquet repository; every split in shards."""

    def split_up(rows: list[Row], features: Features) -> list[bytes]:
        size = max(1, -(-len(rows) // shards))
        return [parquet(rows[start : start + size], features) for start in range(0, len(rows), size)]

    files = {
        c: {s: split_up(rows, features) for s, rows in splits.items()} for c, (features, splits) in configs.items()
    }
    blocks = {c: _features_block(features) for c, (features, _) in configs.items()}
    counts = {c: {s: len(rows) for s, rows in splits.items()} for c, (_, splits) in configs.items()}
    return parquet_repo(name, files, blocks, counts)


def _features_block(features: Features) -> str:
    import yaml

    text = yaml.safe_dump({"features": features._to_yaml_list()}, sort_keys=False)
    return "\n".join("  " + line for line in text.splitlines())


def scienceqa(name: str = "derek-thomas/ScienceQA", rows: int = 12) -> Repo:
    """Every second row has no picture; hints are often empty; no id column; the answer is an int8."""
    texts = ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = Features(
        {"image": Image(), "choices": List(TEXT), "answer": Value("int8"), **{name: TEXT for name in texts}}
    )

    def row(i: int) -> Row:
        choices = ["cat", "dog", "emu"][: 2 + i % 2]
        cells = dict.fromkeys(texts, "") | {"question": f"Which animal {i}?", "solution": f"It barks {i}."}
        cells["hint"] = f"Hint {i}." if i % 3 == 0 else ""
        cells["solution"] = "" if i % 5 == 4 else cells["solution"]
        return cells | {"image": picture(i) if i % 2 == 0 else None, "choices": choices, "answer": i % len(choices)}

    splits = {"train": range(rows), "validation": range(100, 106), "test": range(200, 206)}
    return repo(name, {"default": (features, {split: [row(i) for i in numbers] for split, numbers in splits.items()})})


def textvqa(name: str = "lmms-lab-encoder/textvqa", pictures: int = 80) -> Repo:
    """Two questions a picture; ten answers; the test split's answers are ten empty strings."""
    features = Features(
        {
            **{name: TEXT for name in ("image_id", "question", "flickr_original_url", "flickr_300k_url", "set_name")},
            **{name: Value("int32") for name in ("question_id", "image_width", "image_height")},
            **{name: List(TEXT) for name in ("question_tokens", "answers", "image_classes", "ocr_tokens")},
            "image": Image(),
        }
    )

    def row(i: int, split: str) -> Row:
        answers = [""] * 10 if split == "test" else ["Nous", "nous", *["nous"] * 5, "knous", "nou s", "unanswerable"]
        return {
            **{"image_id": f"img{i // 2}", "question": f"what brand is {i}?", "set_name": split},
            **{"flickr_original_url": "", "flickr_300k_url": "", "question_id": 34602 + i},
            **{"image_width": 48, "image_height": 36, "question_tokens": ["what"], "answers": answers},
            **{"image_classes": ["Person"], "ocr_tokens": ["NOUS", "7"] if i % 3 else []},
            "image": picture(i // 2, form="JPEG"),
        }

    splits = {"train": range(2 * pictures), "validation": range(1000, 1008), "test": range(2000, 2004)}
    rows = {split: [row(i, split) for i in numbers] for split, numbers in splits.items()}
    return repo(name, {"default": (features, rows)})


def vizwiz(name: str = "lmms-lab-encoder/VizWiz-VQA") -> Repo:
    """Only val and test; the test split's answers are null."""
    features = Features(
        {"question_id": TEXT, "image": Image(), "question": TEXT, "answers": List(TEXT), "category": TEXT}
    )

    def row(i: int, split: str) -> Row:
        answers = None if split == "test" else ["unanswerable"] * 6 + ["basil leaves", "basil", "", "basil"]
        return {
            **{"question_id": f"VizWiz_{split}_{i:08d}", "image": picture(i, form="JPEG"), "question": f"What is {i}?"},
            **{"answers": answers, "category": "unanswerable" if answers else None},
        }

    splits = {split: [row(i, split) for i in range(6)] for split in ("val", "test")}
    return repo(name, {"default": (features, splits)})


def vizwiz_site(pictures: int = 20) -> dict[str, bytes]:
    """The two archives of the site by file name; one picture is missing and one question has only empty answers."""
    rows, images = [], io.BytesIO()
    with zipfile.ZipFile(images, "w") as archive:
        for i in range(pictures):
            name = f"VizWiz_train_{i:08d}.jpg"
            if i != 3:
                archive.writestr(f"train/{name}", picture(5000 + i, form="JPEG")["bytes"])
            words = [""] * 10 if i == 4 else ["grey", "gray", "grey", *["unsuitable"] * 2, *["grey"] * 5]
            answers = [{"answer": word, "answer_confidence": "yes"} for word in words]
            about = {"image": name, "question": f"What color {i}?", "answers": answers}
            rows.append(about | {"answer_type": "other", "answerable": 1})
    notes = io.BytesIO()
    with zipfile.ZipFile(notes, "w") as archive:
        archive.writestr("Annotations/test.json", "[]")
        archive.writestr("Annotations/train.json", json.dumps(rows))
    return {"Annotations.zip": notes.getvalue(), "train.zip": images.getvalue()}


def gqa(name: str = "lmms-lab-encoder/GQA", pictures: int = 40) -> Repo:
    """Questions and pictures apart, ids are strings; two questions name a picture that is not there."""
    question_features = Features(
        {
            **{name: TEXT for name in ("id", "imageId", "question", "answer", "fullAnswer", "entailed", "equivalent")},
            **{"isBalanced": Value("bool"), "groups": {"global": TEXT, "local": TEXT}, "annotations": TEXT},
            **{"types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT}, "semanticStr": TEXT},
            "semantic": List({"operation": TEXT, "argument": TEXT, "dependencies": List(Value("int32"))}),
        }
    )
    image_features = Features({"id": TEXT, "image": Image()})
    configs = {}
    for split, start, count in (("train", 0, pictures), ("testdev", 9000, 6)):
        questions = []
        for i in range(3 * count):
            cells = dict.fromkeys(question_features, None) | {
                **{"id": f"{start + i:08d}", "imageId": f"n{start + i // 3}", "question": f"Who wears plain {i}?"},
                **{"answer": "shirt" if i % 2 else "yes", "fullAnswer": "The shirt is plain.", "isBalanced": True},
                **{"semantic": [], "groups": {"global": "", "local": ""}},
                "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
            }
            questions.append(cells)
        questions[1]["imageId"] = questions[2]["imageId"] = "n404"
        images = [{"id": f"n{start + i}", "image": picture(start + i, form="JPEG")} for i in reversed(range(count))]
        configs[f"{split}_balanced_instructions"] = (question_features, {split: questions})
        configs[f"{split}_balanced_images"] = (image_features, {split: images})
    return repo(name, configs)


def geometry3k(name: str = "hiyouga/geometry3k", *, old: bool = False) -> Repo:
    """The newer revision has more columns; answers are numbers and spaced LaTeX."""
    features = Features({"images": List(Image()), "problem": TEXT, "answer": TEXT})
    if not old:
        features |= {"id": Value("int64"), "choices": List(TEXT), "ground_truth": TEXT}
    answers = ["3", "48", r"5 \sqrt { 3 }", r"4 \frac { 4 } { 11 }", "7.07", r"\sqrt { 26 } / 26"]

    def row(i: int) -> Row:
        new = {"id": i, "choices": ["1", "2", "3", "4"], "ground_truth": "C"}
        row = {"images": [picture(i, (60, 60))], "problem": "<image>Find x.", "answer": answers[i % len(answers)]}
        return row if old else row | new

    splits = {"train": range(10), "validation": range(20, 24), "test": range(30, 36)}
    rows = {split: [row(i) for i in numbers] for split, numbers in splits.items()}
    return repo(name, {"default": (Features(features), rows)})


def pathvqa(name: str = "flaviagiammarino/path-vqa") -> Repo:
    """Half of the questions are closed; some pictures are CMYK; pictures repeat."""
    features = Features({"image": Image(), "question": TEXT, "answer": TEXT})
    answers = ["yes", "no", "in the canals of hering", "bile duct cells"]

    def row(i: int) -> Row:
        mode, number = ("CMYK" if i % 4 == 2 else "RGB"), i // 2
        cells = {"image": picture(number, form="JPEG", mode=mode), "question": f"what is shown {i}?"}
        return cells | {"answer": answers[i % len(answers)]}

    splits = {"train": range(16), "validation": range(100, 104), "test": range(200, 208)}
    return repo(name, {"default": (features, {split: [row(i) for i in n] for split, n in splits.items()})})


def superclevr(name: str = "lmms-lab/LLaVA-OneVision-Data", rows: int = 60) -> Repo:
    """A conversation a row, in one of many configurations; RGBA pictures and free-text labels."""
    features = Features({"id": TEXT, "image": Image(), "conversations": List({"from": TEXT, "value": TEXT})})
    labels = ["False", "No", "1", "Purple", "The bicycle is blue and brown"]

    def row(i: int) -> Row:
        hint = "Hint: Please answer the question and provide the final answer at the end."
        asked = f"<image>\n{hint}\nQuestion: How many {i}?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": labels[i % len(labels)]}]
        return {"id": f"{i}.png", "image": picture(i, mode="RGBA"), "conversations": turns}

    config = "Super-CLEVR(MathV360K)"
    return repo(
        name,
        {
            config: (features, {"train": [row(i) for i in range(rows)]}),
            "VizWiz(MathV360K)": (features, {"train": [row(0)]}),
        },
    )


def superclevr_official(
    name: str = "RyanWW/Super-CLEVR", pictures: Sequence[int] = (0, 19_999, 20_000, 25_000, 29_999)
) -> Repo:
    """An archive and a JSON file; answers are truth values, counts and words; every split is called "new"."""
    images, questions = io.BytesIO(), []
    with zipfile.ZipFile(images, "w") as archive:
        for index in pictures:
            name_ = f"superCLEVR_new_{index:06d}.png"
            archive.writestr(f"images/{name_}", picture(index, mode="RGBA")["bytes"])
            for number, answer in enumerate([True, False, 3, "bus"]):
                about = {"split": "new", "image_filename": name_, "image_index": index, "image": name_[:-4]}
                about |= {"question": f"Is there a bus {number}?", "answer": answer, "question_index": number}
                questions.append(about | {"program": [{"type": "scene", "inputs": []}]})
    info = {"date": "", "version": "1.0", "split": "new", "license": "Creative Commons Attribution (CC-BY 4.0)"}
    text = json.dumps({"info": info, "questions": questions})
    return Repo(name, {"images.zip": images.getvalue(), "superCLEVR_questions_30k.json": text.encode()})


def mmmu(name: str = "lmms-lab-encoder/MMMU") -> Repo:
    """Options and kinds of pictures are Python lists as text; places in question and options; open gold lists."""
    texts = (
        "id",
        "question",
        "options",
        "explanation",
        "img_type",
        "answer",
        "topic_difficulty",
        "question_type",
        "subfield",
    )
    features = Features({**{n: TEXT for n in texts}, **{f"image_{i}": Image() for i in range(1, 8)}})
    cases = [
        ("<image 1> What is the cost?", "['$6', '$7']", "B", "multiple-choice", 1),
        ("Which plot fits?", "['<image 1>', '<image 2>', 'none']", "A", "multiple-choice", 2),
        ("<image 1> Name it.", "[]", "['sonata', 'the sonata']", "open", 1),
        ("What is shown?", "['a', 'b']", "A", "multiple-choice", 1),
        ("<image 2> How much?", "[]", "42", "open", 2),
    ]

    def row(i: int, split: str) -> Row:
        first = {"validation": 0, "dev": 20_000, "test": 30_000}[split]
        question, options, answer, kind, count = cases[i % len(cases)]
        pictures = {f"image_{k}": picture(first + i * 10 + k) if k <= count else None for k in range(1, 8)}
        cells = {"id": f"{split}_Accounting_{i}", "question": question, "options": options, "explanation": ""}
        cells |= {"img_type": "['Tables']", "topic_difficulty": "Easy", "subfield": "Finance", "question_type": kind}
        return cells | {"answer": "?" if split == "test" else answer} | pictures

    splits = {
        split: [row(i, split) for i in range(count)] for split, count in (("dev", 5), ("validation", 10), ("test", 5))
    }
    return repo(name, {"default": (features, splits)})


def mmlu_pro(name: str = "TIGER-Lab/MMLU-Pro") -> Repo:
    """Up to ten options, some padded with N/A; no pictures."""
    features = Features(
        {
            **{"question_id": Value("int64"), "question": TEXT, "options": List(TEXT), "answer": TEXT},
            **{"answer_index": Value("int64"), "cot_content": TEXT, "category": TEXT, "src": TEXT},
        }
    )

    def row(i: int) -> Row:
        options = [f"option {j}" for j in range(4 + i % 7)] + (["N/A"] if i % 4 == 1 else [])
        cells = {"question_id": 70 + i, "question": f"Which rule {i}?", "options": options, "answer": "ABCD"[i % 4]}
        return cells | {"answer_index": i % 4, "cot_content": "", "category": "law", "src": "ori_mmlu"}

    splits = {"validation": [row(i) for i in range(7)], "test": [row(i) for i in range(100, 112)]}
    return repo(name, {"default": (features, splits)})


def pope(name: str = "lmms-lab-encoder/POPE") -> Repo:
    """A default configuration with all questions and one with a split a category; pictures repeat."""
    texts = ("id", "question_id", "question", "answer", "image_source", "category")
    features = Features({**{n: TEXT for n in texts}, "image": Image()})

    def row(i: int, category: str) -> Row:
        cells = {"id": str(i), "question_id": str(i % 6), "question": f"Is there a dog {i} in the image?"}
        cells |= {
            "answer": "yes" if i % 2 else "no",
            "image_source": f"COCO_val2014_{i // 3:012d}",
            "category": category,
        }
        return cells | {"image": picture(i // 3, form="JPEG")}

    full = {name: [row(i, name) for i in range(6)] for name in ("adversarial", "popular", "random")}
    return repo(
        name,
        {"default": (features, {"test": [row for rows in full.values() for row in rows]}), "Full": (features, full)},
    )


ALL: dict[str, Callable[[], Repo]] = {
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "geometry3k": geometry3k,
    "pathvqa": pathvqa,
    "superclevr": superclevr,
    "superclevr_official": superclevr_official,
    "mmmu": mmmu,
    "mmlu_pro": mmlu_pro,
    "pope": pope,
}

"""The report of a run: `report.html`, one file that opens anywhere, made from the files of the workdir alone.

    python -m vlm_jax.training.report WORKDIR

writes it anew and prints its path.
"""
import argparse
import base64
from collections.abc import Mapping, Sequence
import json
import os
from pathlib import Path
import statistics
import struct
import sys
from typing import Any

from vlm_jax.errors import CheckpointError
from vlm_jax.training.append_file import is_remote
from vlm_jax.training.metrics import duration, read_metrics
from vlm_jax.training.report_files import (
    as_dict,
    as_list,
    children,
    open_folder,
    parameter_bytes,
    parameter_count,
    parameter_total,
    read_bytes,
    read_evaluations,
    read_json,
    read_text,
)
from vlm_jax.training.report_html import bar_cell, compact_json, escape, folded, is_number, is_share, line_chart, number, plural, table, words
from vlm_jax.training.report_style import STYLE

PICTURES_LIMIT = 24 * 2**20   # bytes of pictures in one report
PREDICTIONS_SHOWN = 12

CAPTIONS = {
    "text_to_image": "For each text, the pictures that the model finds closest, best first.",
    "image_to_text": "For each picture, the texts that the model finds closest, best first.",
    "recall_curve": "How often a right answer is among the first k.",
    "confusion": "Which class (row) is taken for which (column).",
    "classified": "Pictures with the class that the model gives them.",
    "episodes": "Questions behind their last examples, what the model answers, and below it what is right.",
}
CURVES = {"mfu": "Share of the machine's speed (MFU)", "data_wait": "Share of the time that waits for data"}
SYSTEMS = {"siglip": "SigLIP", "siglip2": "SigLIP 2", "clip": "CLIP", "lit": "LiT"}
LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "sw": "Swahili",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}
COUNTS = ("pictures", "classes", "queries", "seconds")   # fields of an evaluation that say how it was done, not how well


def write_report(workdir: str | os.PathLike) -> str:
    """Writes `report.html` into the workdir and returns its path. Files that are missing are left out of it. On a pod, process 0 writes."""
    import jax
    if jax.process_index() != 0:
        return os.path.join(os.fspath(workdir), "report.html")
    return _write(workdir)


def _write(workdir: str | os.PathLike) -> str:
    folder = open_folder(workdir)
    path = os.path.join(os.fspath(workdir), "report.html")
    page = build_report(folder)
    if is_remote(path):
        (folder / "report.html").write_text(page)
        return path
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(f"{path}.tmp", path)
    return path


def build_report(folder: Path) -> str:
    """Returns the page of the run in `folder`."""
    config, environment = read_json(folder / "config.json"), read_json(folder / "environment.json")
    rows = read_metrics(os.fspath(folder))
    train = [row for row in rows if row.get("kind") == "train"]
    evaluations = read_evaluations(folder, rows)
    parameters = read_text(folder / "parameters.txt")
    name = str(config.get("name") or os.path.basename(os.path.normpath(os.fspath(folder))) or "run")
    parts = [
        f'<header><h1>{escape(words(name))}</h1><p class="lead">{escape(sentence(config, train, parameters))}</p></header>',
        headline(train, evaluations, parameters, environment),
        _training(config, train),
        _left_out(folder, train),
        *(_evaluation(folder, title, steps) for title, steps in evaluations.items()),
        _times(config, train, evaluations, environment),
        "<h2>The run in full</h2>",
        folded("Config", "every setting, resolved", f"<pre>{escape(compact_json(config))}</pre>") if config else "",
        folded("Parameters", escape(parameter_total(parameters)), f"<pre>{escape(parameters)}</pre>") if parameters else "",
        folded("Environment", "versions and devices", _environment(environment)) if environment else "",
        '<footer>Written by vlm_jax from the files of the run. To write it anew: <code>python -m vlm_jax.training.report WORKDIR</code></footer>',
    ]
    body = "\n".join(part for part in parts if part)
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{escape(words(name))}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n')


def sentence(config: Mapping[str, Any], train: Sequence[Mapping[str, Any]], parameters: str = "") -> str:
    """Returns what the run is in one plain sentence or two."""
    model, stages, task = as_dict(config.get("model")), as_list(config.get("stages")), as_dict(config.get("task"))
    if not model:
        return "A training run."
    system = SYSTEMS.get(str(model.get("name")), words(str(model.get("name", "model"))))
    size = f" of {number(parameter_count(parameters))} parameters" if parameter_count(parameters) else ""
    article = "An" if system[0] in "AEIOU" else "A"
    text = f"{article} {system} model{size}"
    text += f", trained for {plural(train[-1]['step'], 'step')}" if train else ", before its first logged step"
    sources, batch = [], None
    for stage in stages:
        for stream in as_dict(as_dict(stage).get("data")).values():
            source = as_dict(as_dict(stream).get("source"))
            batch = as_dict(stream).get("batch_size") or batch
            if source.get("name") and source["name"] not in sources:
                sources.append(source["name"])
    text += f" of {batch} examples" if batch and train and len(stages) == 1 else f" in {len(stages)} stages" if train and len(stages) > 1 else ""
    text += f" on {' and '.join(words(str(source)) for source in sources)}" if sources else ""
    text += ". It learns to place a picture and the texts that describe it close together" if task.get("name") == "contrastive" else ""
    text += f", with the {words(str(task['loss']))} loss" if task.get("loss") and task.get("name") == "contrastive" else ""
    return text + "."


def headline(train: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Mapping[int, Mapping[str, Any]]], parameters: str,
             environment: Mapping[str, Any]) -> str:
    """Returns the numbers to see first, as big figures: a few evaluations, the loss, the time, the size."""
    figures = []
    for name, steps in evaluations.items():
        metrics = steps[max(steps)]
        keys = [key for key in ("top1", "text_to_image/r@1", "image_to_text/r@1") if is_number(metrics.get(key))]
        keys = keys or [key for key, value in metrics.items() if key not in COUNTS and is_number(value) and key.count("/") < 2][:1]
        for key in keys[:2]:
            title = ", ".join([words(name), *map(words, key.split("/")[:-1])])
            figures.append((title, number(metrics[key], key), _remark(metrics, key)))
    figures = figures[:4]
    losses = [row["loss"] for row in train if is_number(row.get("loss"))]
    if losses:
        figures.append(("training loss", number(round(losses[-1], 3)), f"{number(round(losses[0], 3))} at step {train[0]['step']:,}"))
    seconds = training_seconds(train)
    if seconds:
        rates = [row["examples_per_second"] for row in train if is_number(row.get("examples_per_second"))]
        figures.append(("time in training", duration(seconds), f"{number(round(statistics.median(rates)))} examples/s" if rates else ""))
    if parameter_count(parameters):
        figures.append(("parameters", _short(parameter_count(parameters)), parameter_bytes(parameters)))
    speed = [row["gflops"] for row in train if is_number(row.get("gflops"))]
    if speed:
        machine = environment.get("matmul_gflops")
        reached = f"of {number(round(machine))} GF/s in a plain matrix product" if is_number(machine) else ""
        figures.append(("speed of the model", f"{number(round(statistics.median(speed)))} GF/s", reached))
    cells = [f'<div><dt>{escape(title)}</dt><dd class="value">{_small_unit(escape(value))}</dd><dd class="remark">{escape(remark)}</dd></div>'
             for title, value, remark in figures[:8]]
    cells += ["<div></div>"] * (-len(cells) % (4 if len(cells) > 2 else 2))
    return f'<dl class="figures">{"".join(cells)}</dl>' if figures else '<p class="note">No metrics yet.</p>'


def training_seconds(train: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds spent in steps, without compiling, saving and evaluating; steps without a rate count like the median one."""
    rates = [row["seconds_per_step"] for row in train if is_number(row.get("seconds_per_step"))]
    if not rates:
        return 0.0
    total, before = 0.0, 0
    for row in train:
        rate = row.get("seconds_per_step")
        total += max(0, row["step"] - before) * (rate if is_number(rate) else statistics.median(rates))
        before = row["step"]
    return total


def metric_words(key: str) -> str:
    """Returns the name of a metric as people say it: `text_to_image/r@1` is `text to image, recall@1`."""
    special = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "mean_per_class": "mean per-class accuracy"}
    parts = [f"recall@{part[2:]}" if part.startswith("r@") else special.get(part, words(part)) for part in key.split("/")]
    return ", ".join(parts)


def _training(config: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> str:
    stages, ends = as_list(config.get("stages")), []
    for stage in stages[:-1]:
        steps = as_dict(stage).get("steps")
        ends.append((ends[-1] if ends else 0) + (steps if is_number(steps) else 0))

    def curve(title: str, key: str, smoothed: bool = False) -> str:
        return line_chart(title, {key: [(row["step"], row.get(key)) for row in train]}, ends, smoothed)

    first = curve("Loss", "loss", True) + curve("Learning rate", "learning_rate")
    known = ("step", "kind", "loss", "learning_rate", "seconds_per_step", "examples_per_second", "gflops", "bad_records", "skipped", "failed_saves")
    others = sorted({key for row in train for key, value in row.items() if key not in known and is_number(value)})
    more = curve("Examples per second", "examples_per_second") + "".join(curve(CURVES.get(key, words(key).capitalize()), key) for key in others[:24])
    if not first and not more:
        return ""
    return (f'<h2>Training</h2><div class="charts">{first}</div>'
            + (folded("More curves", "of every quantity in the log", f'<div class="charts">{more}</div>') if more else ""))


def _left_out(folder: Path, train: Sequence[Mapping[str, Any]]) -> str:
    """What the guard rejected, and saves that failed: counts of the log, events of diverged.json."""
    from vlm_jax.training.guard import read_events
    last = train[-1] if train else {}
    counts = [f"{plural(last[key], one)} {what}" for key, one, what in (("skipped", "step", "left out"), ("failed_saves", "save", "failed"))
              if is_number(last.get(key)) and last[key]]
    events = [as_dict(event) for event in read_events(os.fspath(folder))]
    rows = [[escape(str(event.get(key, ""))) for key in ("step", "kind", "action", "loss", "gradient_norm")]
            + [escape(", ".join(f"{stream}: {' '.join(map(str, as_list(ids)[:8]))}{' ...' if len(as_list(ids)) > 8 else ''}"
                                for stream, ids in as_dict(event.get("example_id")).items()))] for event in events[-20:]]
    if not counts and not rows:
        return ""
    head = ["step", "why", "what was done", "loss", "gradient norm", "examples"]
    listed = folded("Steps left out", f"the last {len(rows)} of diverged.json", table(head, rows, numbers=False)) if rows else ""
    return (f'<p class="note">{escape(", ".join(counts))}.</p>' if counts else "") + listed


def _evaluation(folder: Path, name: str, steps: Mapping[int, Mapping[str, Any]]) -> str:
    last = max(steps)
    metrics = steps[last]
    shown = {key: value for key, value in metrics.items() if key not in COUNTS and (is_number(value) or value is None)}
    single = {key: value for key, value in shown.items() if key.count("/") < 2}
    counts = [f"{number(metrics[key])} {key}" for key in ("pictures", "classes") if is_number(metrics.get(key))]
    counts += [f"{metrics['seconds']:.1f} seconds"] if is_number(metrics.get("seconds")) else []
    charts = ""
    for suffix, group in _by_kind(single).items():
        charts += line_chart(f"{suffix} over steps", {key: [(step, steps[step].get(key)) for step in sorted(steps)] for key in group}, called=_called)
    files = folder / "evaluations" / name / str(last)
    parts = [f'<h2>Evaluation: {escape(words(name))}</h2><p class="note">At step {last:,}{": " + escape(", ".join(counts)) if counts else ""}.</p>',
             f'<div class="side">{_metric_tables(single)}{charts}</div>' if single or charts else "",
             _language_table({key: value for key, value in shown.items() if key.count("/") >= 2}), _pictures(files),
             _predictions(files / "predictions.jsonl")]
    return "".join(parts)


def _called(key: str) -> str:
    return words(key.split("/")[0]) if "/" in key else metric_words(key).removesuffix(" accuracy")


def _by_kind(metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for key in metrics:
        last = key.split("/")[-1]
        kind = "Recall@1" if last == "r@1" else "Accuracy" if "/" not in key and is_share(key) else None
        if kind:
            kinds.setdefault(kind, []).append(key)
    return kinds or {"Metrics": list(metrics)[:6]}


def _metric_tables(metrics: Mapping[str, Any]) -> str:
    """One table of the metrics that stand alone and one of those that come in both directions."""
    alone = {key: value for key, value in metrics.items() if "/" not in key}
    paired = {key: value for key, value in metrics.items() if "/" in key}
    tables = []
    if alone:
        tables.append(table(["metric", "value", ""],
                            [(escape(metric_words(key)), escape(number(value, key)), bar_cell(value, key)) for key, value in alone.items()]))
    if paired:
        columns = list(dict.fromkeys(key.split("/")[0] for key in paired))
        lines = list(dict.fromkeys(key.split("/", 1)[1] for key in paired))
        rows = [(escape(metric_words(line)), *(escape(number(paired.get(f"{column}/{line}"), line)) for column in columns)) for line in lines]
        tables.append(table(["metric", *(escape(words(column)) for column in columns)], rows))
    return f'<div>{"".join(tables)}</div>' if tables else ""


def _language_table(metrics: Mapping[str, Any]) -> str:
    """Rows are the languages, columns the metrics, gathered by direction."""
    if not metrics:
        return ""
    split = [key.rsplit("/", 1) for key in metrics]
    languages = list(dict.fromkeys(language for _, language in split))
    bases = list(dict.fromkeys(base for base, _ in split))
    groups = list(dict.fromkeys(base.split("/")[0] for base in bases))
    bases = [base for group in groups for base in bases if base.split("/")[0] == group]
    above = "<tr><th></th>" + "".join(f'<th class="group" scope="colgroup" colspan="{sum(base.split("/")[0] == group for base in bases)}">'
                                      f"{escape(words(group))}</th>" for group in groups) + "</tr>"
    rows = [(escape(LANGUAGES.get(language, language)), *(escape(number(metrics.get(f"{base}/{language}"), base)) for base in bases))
            for language in languages]
    title = "By language" if all(len(language) <= 3 or "-" in language for language in languages) else "In parts"
    return f'<h3>{title}</h3>' + table(["", *(escape(words(base.split("/", 1)[-1])) for base in bases)], rows, above=above)


def _pictures(folder: Path) -> str:
    """The PNG files of an evaluation, largest first."""
    found = []
    for path in children(folder):
        data = read_bytes(path) if path.name.endswith(".png") else b""
        if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
            found.append((*struct.unpack(">II", data[16:24]), path.name.removesuffix(".png"), data))
    figures, used = [], 0
    for width, height, name, data in sorted(found, key=lambda item: (-item[0] * item[1], item[2])):
        used += len(data)
        title = words(name).capitalize()
        caption = f"{title}. {CAPTIONS[name]}" if name in CAPTIONS else f"{title}."
        if used > PICTURES_LIMIT:
            figures.append(f'<p class="note">{escape(title)} is too large to be shown here; it is in the folder of the evaluation.</p>')
            continue
        kind = ' class="wide"' if width >= 800 else ""
        figures.append(f'<figure{kind} style="width:{min(width, 1000)}px"><div class="scroll">'
                       f'<img width="{width}" height="{height}" alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
                       f"</div><figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _predictions(path: Path) -> str:
    """A few predictions, evenly spread over the file, as text."""
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    picked = [lines[i * len(lines) // PREDICTIONS_SHOWN] for i in range(PREDICTIONS_SHOWN)] if len(lines) > PREDICTIONS_SHOWN else lines
    rows = []
    for line in picked:
        try:
            item = json.loads(line)
        except ValueError:
            continue
        if not isinstance(item, dict):
            continue
        best = as_dict(next(iter(as_list(item.get("answers"))), {"text": item.get("answer", "")}))
        right = item.get("rank") == 1 if "rank" in item else item.get("answer") == item.get("label")
        rows.append((escape(_place(item)), f'<td class="text" dir="auto">{escape(_said(item.get("query", item)))}</td>',
                     f'<td class="text {"right" if right else "wrong"}" dir="auto">{escape(_said(best))}</td>',
                     f"<td>{escape(number(item.get('rank')))}</td>"))
    if not rows:
        return ""
    head = ["task", "asked, or true", "first answer", "rank of the right one"]
    return folded("Some predictions", f"{len(rows)} of {len(lines):,}, evenly spread; all are in predictions.jsonl", table(head, rows, numbers=False))


def _place(item: Mapping[str, Any]) -> str:
    language = item.get("language")
    direction = words(str(item["direction"])) if item.get("direction") else f"picture {item.get('index', '')}"
    return f"{direction}, {LANGUAGES.get(language, language)}" if language else direction


def _said(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return next((str(value[key]) for key in ("text", "caption", "class", "name", "label", "index") if value.get(key) not in (None, "")), "–")


def _times(config: Mapping[str, Any], train: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Mapping[int, Mapping[str, Any]]],
           environment: Mapping[str, Any]) -> str:
    def median(key: str) -> float | None:
        values = [row[key] for row in train if is_number(row.get(key))]
        return statistics.median(values) if values else None

    seconds = training_seconds(train)
    evaluating = sum(metrics["seconds"] for steps in evaluations.values() for metrics in steps.values() if is_number(metrics.get("seconds")))
    values = {
        "time in training steps": duration(seconds) if seconds else None,
        "time in evaluations": duration(evaluating) if evaluating else None,
        "seconds a step, median": median("seconds_per_step"),
        "examples a second, median": median("examples_per_second"),
        "share of all time that is training steps (goodput)": _goodput(train),
        "share of the time that waits for data": _percent(median("data_wait")),
        "model, GF/s": median("gflops"),
        "machine, GF/s in a matrix product": environment.get("matmul_gflops"),
        "share of the machine's speed that the model reaches": _percent(median("mfu")),
    }
    shown = [(escape(title), escape(number(value))) for title, value in values.items() if value is not None]
    started = environment.get("started")
    shown += [("began", escape(str(started).replace("T", " ").replace("+00:00", " UTC")))] if started else []
    return "<h2>Time and speed</h2>" + table([], shown) if shown else ""


def _goodput(train: Sequence[Mapping[str, Any]]) -> str | None:
    seconds = as_dict(train[-1].get("goodput")) if train else {}
    total = sum(value for value in seconds.values() if is_number(value))
    return _percent(seconds["steps"] / total) if total and is_number(seconds.get("steps")) else None


def _percent(value: float | None) -> str | None:
    return None if value is None else number(value, "accuracy")


def _environment(environment: Mapping[str, Any]) -> str:
    rows = []
    for key, value in environment.items():
        if key == "packages":
            rows += [(escape(name), escape(version)) for name, version in as_dict(value).items()]
        elif isinstance(value, list):
            rows.append((escape(words(key)), escape(" ".join(without for without in map(_last_part, value)))))
        elif isinstance(value, dict):
            rows.append((escape(words(key)), escape(", ".join(f"{name} {item}" for name, item in value.items()) or "–")))
        else:
            rows.append((escape(words(key)), escape(number(value))))
    return table([], [(name, f'<td class="text">{value}</td>') for name, value in rows], numbers=False)


def _last_part(argument: Any) -> str:
    text = str(argument)
    return text.rsplit("/", 1)[-1] if text.startswith("/") else text


def _remark(metrics: Mapping[str, Any], key: str) -> str:
    last, pictures, classes = key.split("/")[-1], metrics.get("pictures"), metrics.get("classes")
    beside = f"of {number(pictures)} pictures" if is_number(pictures) else ""
    if last == "top1" and is_number(classes) and classes > 0:    # for retrieval it is not 1 / pictures: several may be right
        beside = f"chance {number(1 / classes, last)}"
    return ", ".join(part for part in (metric_words(last), beside) if part)


def _small_unit(text: str) -> str:
    value, space, unit = text.replace("\u00a0", " ").partition(" ")
    return f"{value}<small> {unit}</small>" if space else text


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million" if count >= 1e6 else f"{count:,}"


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m vlm_jax.training.report WORKDIR`."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.training.report", description="Writes report.html of a run anew from its files.")
    parser.add_argument("workdir", help="the folder of a run")
    workdir = parser.parse_args(argv).workdir
    if not is_remote(workdir) and not os.path.isdir(workdir):
        sys.exit(str(CheckpointError(f"{workdir}: no such folder; give the workdir of a run.")))
    print(_write(workdir))


if __name__ == "__main__":
    main()

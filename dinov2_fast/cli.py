"""The command line: verbs and their arguments, no logic of their own.

Exit codes: 0 done, 1 unexpected error, 2 usage or configuration, 3 data, 4 numerics,
5 checkpoint, 6 out of memory, 7 output, 75 stopped by SIGTERM after saving, 130 by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2_fast.bench.command import add_bench
from dinov2_fast.config import Config, load_config, preset_names, to_dict
from dinov2_fast.errors import ConfigError, UserError, nearest_name


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; never shows a traceback for what the user can mend.

    Args:
        arguments: words after the program's name.
    Returns:
        The exit code of the process.
    """
    try:
        parser = _parser()
        options, rest = parser.parse_known_args(list(arguments))
        if rest and options.verb != "train":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return options.action(options, rest)
    except UserError as error:
        stopped = error.exit_code in (75, 130)  # asked for, and saved: not an error
        print(error if stopped else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; a closed stdout would raise again when it is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    """Say what failed in one line and keep the traceback in a file."""
    # torch has no type of its own for the CPU's.
    on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    if on_cpu or type(error).__name__ == "OutOfMemoryError":
        print(
            f"error: out of {'' if on_cpu else 'GPU '}memory: {error}\n"
            "Smaller --batch-size, smaller crops, fewer prototypes or --run.precision bf16 need "
            "less; train --dry-run says what a run holds all the time.",
            file=sys.stderr,
        )
        return 6
    with tempfile.NamedTemporaryFile(
        "w", prefix="dinov2-fast-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exc(file=file)
    print(
        f"unexpected error: {type(error).__name__}: {error}\n"
        f"This is a bug in dinov2_fast; the traceback is in {file.name}",
        file=sys.stderr,
    )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinov2-fast",
        description="DINOv2 pretraining, features and evaluation, natively fast.",
    )
    from dinov2_fast import __version__

    parser.add_argument("--version", action="version", version=f"dinov2_fast {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_train(verbs)
    _add_demo(verbs)
    _add_eval(verbs)
    _add_embed(verbs)
    _add_convert(verbs)
    add_bench(verbs)
    doctor = verbs.add_parser(
        "doctor", help="what is installed, what runs here, and a 5 s self-test"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(action=_doctor)
    return parser


def _folder(text: str) -> Path:
    """A folder to write into; an empty word, as an unset shell variable gives, is none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)


def _add_train(verbs: Any) -> None:
    train = verbs.add_parser(
        "train",
        help="pretrain a ViT on any folder of images",
        description="Pretrain a ViT on images without labels. The same command again resumes.",
        epilog="Any setting can be given as --section.key VALUE, as in --optimizer.base-lr 2e-4; "
        "CONFIG --settings lists them all with their meaning and value.",
    )
    train.add_argument(
        "config",
        metavar="CONFIG",
        help=f"a preset ({', '.join(preset_names())}) or the path of a YAML file",
    )
    train.add_argument(
        "--data", metavar="PATH", help="folder of images, list of files, tar or folder of tars"
    )
    train.add_argument(
        "--out", type=_folder, metavar="OUT", help="run directory; made if missing, resumed if not"
    )
    train.add_argument(
        "--steps", type=int, help="optimizer steps; all schedules are shares of them"
    )
    train.add_argument("--seed", type=int, help="seed of everything random")
    train.add_argument("--batch-size", type=int, help="images per process and step")
    train.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    train.add_argument(
        "--dry-run", action="store_true", help="print settings, parameters and steps, then stop"
    )
    train.add_argument("--settings", action="store_true", help="list every setting, then stop")
    train.set_defaults(action=_train)


def _add_demo(verbs: Any) -> None:
    demo = verbs.add_parser(
        "demo",
        help="train on real photographs offline and open the report; under 4 minutes on 2 cores",
    )
    demo.add_argument(
        "--out",
        type=_folder,
        required=True,
        metavar="OUT",
        help="folder for images, run and report.html",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    demo.set_defaults(action=_demo)


def _add_eval(verbs: Any) -> None:
    evaluate = verbs.add_parser("eval", help="evaluate frozen features")
    protocols = evaluate.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    knn = protocols.add_parser("knn", help="k-nearest-neighbour classification")
    knn.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="weights (.safetensors, .pth) or a run directory",
    )
    knn.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with train/ and test/ or val/, or one folder",
    )
    knn.add_argument(
        "--train", type=Path, metavar="DIR", help="labelled images that vote, instead of --data"
    )
    knn.add_argument("--test", type=Path, metavar="DIR", help="labelled images that are classified")
    knn.add_argument("--json", action="store_true", help="print one JSON object")
    _add_feature_options(knn)
    knn.set_defaults(action=_eval_knn)


def _add_embed(verbs: Any) -> None:
    embed = verbs.add_parser("embed", help="write features of a folder of images to a file")
    embed.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="weights (.safetensors, .pth) or a run directory",
    )
    embed.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="images, as for train"
    )
    embed.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a .safetensors file"
    )
    embed.add_argument("--json", action="store_true", help="print one JSON object")
    _add_feature_options(embed)
    embed.set_defaults(action=_embed)


def _add_feature_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-px", type=int, help="side of the square the network sees (default: the model's)"
    )
    parser.add_argument(
        "--resize-px",
        type=int,
        help="side the shorter edge is resized to before the centre crop "
        "(default: 8/7 of --image-px from 224 on, --image-px below)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images per forward (default 64)"
    )
    parser.add_argument(
        "--num-workers", type=int, default=-1, help="threads that decode (default: one per core)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the network"
    )


def _feature_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("image_px", "resize_px", "batch_size", "num_workers", "device", "precision")
    return {name: getattr(options, name) for name in names}


def _add_convert(verbs: Any) -> None:
    convert = verbs.add_parser(
        "convert", help="translate backbone weights between official, timm and Hugging Face"
    )
    convert.add_argument(
        "source",
        type=Path,
        metavar="IN",
        help="weights of any known layout, recognised by their keys, or a run directory",
    )
    convert.add_argument(
        "target", type=Path, metavar="OUT", help=".safetensors, .pth, or a folder for --to hf"
    )
    convert.add_argument(
        "--to", required=True, choices=("official", "timm", "hf"), help="layout to write"
    )
    convert.set_defaults(action=_convert)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    config = _config(options, rest)
    from dinov2_fast.train import trainer
    from dinov2_fast.train.memory import reuse_freed_memory

    if options.dry_run:
        print(trainer.describe(config))
        return 0
    if not config.data.path:
        raise ConfigError(
            "train: no images given; add --data PATH (a folder, a list of files or tar files)"
        )
    if options.out is None:
        raise ConfigError("train: no run directory given; add --out OUT")
    reuse_freed_memory()
    trainer.train(config, options.out)
    return 0


def _config(options: argparse.Namespace, rest: list[str]) -> Config:
    """Preset or file, then --section.key words, then the short options."""
    import tyro

    config = load_config(options.config)
    words = ["--help"] if options.settings else _setting_words(rest, config)
    config = tyro.cli(
        Config,
        prog=f"dinov2-fast train {options.config}",
        description="Settings",
        args=words,
        default=config,
    )
    short = {
        "data.path": options.data,
        "schedule.total_steps": options.steps,
        "run.seed": options.seed,
        "run.batch_size": options.batch_size,
        "run.device": options.device,
    }
    return config.updated({key: value for key, value in short.items() if value is not None})


def _setting_words(rest: list[str], config: Config) -> list[str]:
    """The words for tyro: unknown names are refused in one line, `--switch false` is understood."""
    keys = _setting_types(to_dict(config))
    short = ["data", "out", "steps", "seed", "batch-size", "device", "dry-run", "settings"]
    words: list[str] = []
    for word in (part for w in rest for part in (w.split("=", 1) if w[:2] == "--" else [w])):
        name = words[-1] if words else ""
        if keys.get(_key(name)) is bool and word.lower() in ("true", "false"):
            section, _, last = name.rpartition(".")
            words[-1] = name if word.lower() == "true" else f"{section}.no-{last}"
            continue
        if word.startswith("--") and _key(word).replace(".no_", ".") not in keys:
            known = [f"--{key.replace('_', '-')}" for key in [*short, *keys]]
            nearest = nearest_name(word.replace("_", "-"), known)
            raise ConfigError(f"train: unknown option {word}{nearest}; CONFIG --settings lists all")
        words.append(word)
    return words


def _key(option: str) -> str:
    """The setting that an option's name stands for."""
    return option.removeprefix("--").replace("-", "_")


def _setting_types(values: dict[str, Any], prefix: str = "") -> dict[str, type]:
    """Dotted keys of nested settings and the types of their values."""
    found: dict[str, type] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        found |= _setting_types(value, f"{prefix}{key}.") if nested else {prefix + key: type(value)}
    return found


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    from dinov2_fast.demo import run_demo
    from dinov2_fast.train.memory import reuse_freed_memory

    reuse_freed_memory()
    run_demo(options.out, seed=options.seed)
    return 0


def _eval_knn(options: argparse.Namespace, rest: list[str]) -> int:
    from dinov2_fast.evaluation import knn

    result = knn.evaluate_knn(
        options.checkpoint,
        data=options.data,
        train=options.train,
        test=options.test,
        **_feature_options(options),
    )
    print(json.dumps(result) if options.json else knn.format_result(result))
    return 0


def _embed(options: argparse.Namespace, rest: list[str]) -> int:
    from dinov2_fast.features import embed

    result = embed(
        options.checkpoint,
        data=options.data,
        out=options.out,
        **_feature_options(options),
    )
    left_out = len(result["unreadable"])
    note = f"; {left_out} unreadable, listed in {result['names']}" if left_out else ""
    text = f"{result['images']} images -> {options.out}{note}"
    print(json.dumps(result) if options.json else text)
    return 0


def _convert(options: argparse.Namespace, rest: list[str]) -> int:
    from dinov2_fast.models.frozen import find_weights
    from dinov2_fast.models.pretrained import convert_file

    print(convert_file(find_weights(options.source), options.target, to=options.to))
    return 0


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    from dinov2_fast import doctor

    return doctor.main(as_json=options.json)

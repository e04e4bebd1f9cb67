"""AutoMM's example of distillation on GLUE, with the same flags and the same columns.

    python examples/automm_distillation.py --glue_task rte --teacher_model FOLDER --student_model FOLDER

A teacher and a student are fine-tuned as they are, and the student once more from the teacher's answers. Models
are folders or hub ids, and so is the data; without --glue_path it comes from the hub. Beside every number stands
its 95 % interval over the validation examples; beside the speed-up, what the quartiles of the timed batches give.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from limbeck.compat.automm import METRIC_NAMES, MultiModalPredictor
from limbeck.evaluate import Bootstrap, compare, measure_speed
from limbeck.models import fingerprint
from limbeck.tasks.glue import GLUE, load_split

METRICS = {
    "mnli": ["accuracy"],
    "qqp": ["accuracy", "f1"],
    "qnli": ["accuracy"],
    "sst2": ["accuracy"],
    "stsb": ["pearsonr", "spearmanr"],
    "mrpc": ["accuracy"],
    "rte": ["accuracy"],
}
"""What is measured of each task; the first one also chooses the best epoch."""

MNLI = {"mnli": "validation_matched", "mnlim": "validation_matched", "mnlimm": "validation_mismatched"}
MADE_BY = "made-by.json"
RESAMPLES = 1000
"""Of the validation examples, for the intervals."""


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--glue_task", default="qnli", choices=[*METRICS, "mnlim", "mnlimm"])
    parser.add_argument("--glue_path", help="a folder with rte/train.parquet and the like; by default the hub")
    parser.add_argument("--teacher_model", default="google/bert_uncased_L-12_H-768_A-12")
    parser.add_argument("--student_model", default="google/bert_uncased_L-6_H-768_A-12")
    parser.add_argument("--seed", default=123, type=int)
    parser.add_argument("--max_epochs", "--max_epoch", default=1000, type=int, help="of the student")
    parser.add_argument("--time_limit", type=int, help="seconds for each training")
    parser.add_argument("--num_gpu", default=-1, type=int)
    parser.add_argument("--temperature", default=5.0, type=float)
    parser.add_argument("--hard_label_weight", default=0.1, type=float)
    parser.add_argument("--soft_label_weight", default=1.0, type=float)
    parser.add_argument("--output_feature_loss_weight", default=0.01, type=float)
    parser.add_argument("--output_feature_loss_type", default="mse")
    parser.add_argument("--finetuned_model_cache_folder", default="AutogluonModels/cache_finetuned", type=Path)
    parser.add_argument("--retrain", action="store_true", help="make models anew that are in the cache folder")
    return parser.parse_args(given)


def read(args):
    """The training and the validation rows; GLUE's test labels are private."""
    task = "mnli" if args.glue_task in MNLI else args.glue_task
    columns = [*GLUE[task].texts, "label"]
    names = {"train": "train", "validation": MNLI.get(args.glue_task, "validation")}
    splits = {split: load_split(task, (name,), args.glue_path)[0] for split, name in names.items()}
    return task, splits["train"][columns], splits["validation"][columns]


def hyperparameters(args, model, **more):
    return {
        "env.num_gpus": args.num_gpu,
        "model.hf_text.checkpoint_name": model,
        "optim.lr": 1e-4,
        "optim.weight_decay": 1e-3,
        **more,
    }


def finetuned(args, task, train, model, options):
    """A model that was trained without a teacher: from the cache folder, where the same one was made before."""
    made_by = {
        "task": args.glue_task,
        "model": fingerprint(model),
        "options": {name: value for name, value in options.items() if name != "env.num_gpus"},
        "data": hashlib.sha256(train.to_csv().encode()).hexdigest(),
        "seed": args.seed,
        "time_limit": args.time_limit,
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{args.glue_task}-{model.strip('/').replace('/', '-')}-{digest}"
    folder = args.finetuned_model_cache_folder / name
    if (folder / MADE_BY).is_file() and not args.retrain:
        print(f"Using the model in {folder}")
        return MultiModalPredictor.load(folder)
    print(f"Training {model} without a teacher, into {folder}")
    (folder / MADE_BY).unlink(missing_ok=True)
    predictor = MultiModalPredictor(label="label", eval_metric=METRICS[task][0], path=folder)
    predictor.fit(train, hyperparameters=options, time_limit=args.time_limit, seed=args.seed)
    (folder / MADE_BY).write_text(json.dumps(made_by, indent=2))
    return predictor


def distilled(args, task, train, teacher):
    losses = {
        "temperature": args.temperature,
        "hard_label_weight": args.hard_label_weight,
        "soft_label_weight": args.soft_label_weight,
        "output_feature_loss_weight": args.output_feature_loss_weight,
        "output_feature_loss_type": args.output_feature_loss_type,
    }
    options = hyperparameters(args, args.student_model, **{"optim.max_epochs": args.max_epochs})
    options |= {f"distiller.{name}": value for name, value in losses.items()}
    print(f"Distilling {args.student_model}")
    folder = args.finetuned_model_cache_folder / f"{args.glue_task}-distilled"
    predictor = MultiModalPredictor(label="label", eval_metric=METRICS[task][0], path=folder)
    return predictor.fit(
        train,
        hyperparameters=options,
        teacher_predictor=teacher,
        time_limit=args.time_limit,
        seed=args.seed,
    )


def compared(metric, predictors, logits, validation):
    """Scores of the three models with intervals, and how much of the gap the student closed."""
    columns = predictors["teacher"].model.columns
    labels = np.asarray(columns.labels(validation))
    bootstrap = Bootstrap(labels, columns.metric(METRIC_NAMES.get(metric, metric)), resamples=RESAMPLES)
    scores = {role: bootstrap.scores(each) for role, each in logits.items()}
    intervals = {role: Bootstrap.interval(values) for role, values in scores.items()}
    return intervals, compare(bootstrap, logits, scores)


def speed_up(predictors, validation):
    """How many times faster the student is, with what the quartiles of both give."""
    models = {role: predictors[role].model for role in ("teacher", "student")}
    data = {role: model.encode(validation) for role, model in models.items()}
    networks = {role: model.network for role, model in models.items()}
    seconds = measure_speed(networks, data, batch_size=32, repeats=20)
    slow, fast = seconds["teacher"], seconds["student"]
    return slow.value / fast.value, slow.low / fast.high, slow.high / fast.low


def shown(interval, digits=5):
    return f"{interval.value:.{digits}f} ({interval.low:.3f} to {interval.high:.3f})"


def main(given=None):
    args = arguments(given)
    task, train, validation = read(args)
    student_options = hyperparameters(args, args.student_model, **{"optim.max_epochs": args.max_epochs})
    teacher = finetuned(args, task, train, args.teacher_model, hyperparameters(args, args.teacher_model))
    pretrained = finetuned(args, task, train, args.student_model, student_options)
    student = distilled(args, task, train, teacher)

    predictors = {"teacher": teacher, "baseline": pretrained, "student": student}
    logits = {role: [predictor.model.logits(validation)] for role, predictor in predictors.items()}
    times, low, high = speed_up(predictors, validation)
    print(f"\nDistillation result on {args.glue_task}, {len(validation)} validation examples")
    rows = {}
    for metric in METRICS[task]:
        scores, comparison = compared(metric, predictors, logits, validation)
        ratio = shown(comparison.ratio, 2) if comparison.ratio else comparison.ratio_note
        names = [f"{name} Model {metric}" for name in ("Teacher", "Pretrained", "Student")]
        cells = [shown(scores[role]) for role in predictors]
        print(" | ".join([*names, "Distillation Ratio", "Speed Up"]))
        print(" | ".join([*cells, ratio, f"{times:.2f}x ({low:.2f} to {high:.2f})"]))
        rows[metric] = {**scores, "ratio": comparison.ratio, "speed_up": times}
    return rows


if __name__ == "__main__":
    main()

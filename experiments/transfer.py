"""Few-shot transfer of trained runs to the classes that were kept out of their training.

    python -m experiments.transfer --workdir=DIR [--step=latest|all|N] [--split=test|val]
        [--num_ways=5] [--num_shots=1,5] [--num_queries=15] [--num_episodes=2000] [--seed=0]
        [--head=nearest_mean|cosine|ridge|logistic_regression|fine_tuning]
        [--features=none|l2|centred|centred_l2] [--regularization=1.0]
        [--fine_tuning_steps=50] [--fine_tuning_learning_rate=0.01] [--data_dir=...]
    python -m experiments.transfer --runs=DIR ...

Prints source GC and NC, target NC, accuracy with its 95% half-width and the bound on the
nearest-mean error, with one line for each setting. Merges them into DIR/transfer.json and draws
them in DIR/figures/transfer_SPLIT_HEAD.png. With --runs it evaluates every run below DIR at one
step each, ranks them by source GC, and writes the rank correlation of source GC with target NC and
with accuracy to DIR/selection_SPLIT_HEAD.json and .png.

Exit codes: 0, done; 2, bad input, and nothing was written; 130, stopped by Ctrl-C, and what was
measured so far is written.
"""

from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments import launcher
from gc_nc.errors import InputError
from gc_nc.measurement import transfer_evaluation, transfer_results
from gc_nc.measurement.transfer_evaluation import FINE_TUNING, Protocol, Task
from gc_nc.runs.finished_run import FinishedRun, open_run

_DEFAULTS = Protocol()
# Other commands have flags of the same name, and tests import several commands.
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", allow_override=True)
_RUNS = flags.DEFINE_string("runs", None, "Folder of runs to rank.", allow_override=True)
_STEP = flags.DEFINE_string(
    "step", "latest", "Which checkpoint: latest, all, or a step.", allow_override=True
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data are now, if they have moved.", allow_override=True
)
_GC_EXAMPLES = flags.DEFINE_integer(
    "gc_examples",
    1024,
    "Random source images to estimate GC on.",
    lower_bound=2,
    allow_override=True,
)
_GC_PROBES = flags.DEFINE_integer(
    "gc_probes",
    4,
    "Random Jacobian products for each of these images.",
    lower_bound=1,
    allow_override=True,
)
_SPLIT = flags.DEFINE_string(
    "split", _DEFAULTS.split, "Which classes kept from training: test or val."
)
_NUM_WAYS = flags.DEFINE_list("num_ways", ["5"], "Classes in an episode; commas separate several.")
_NUM_SHOTS = flags.DEFINE_list(
    "num_shots", ["1", "5"], "Support images of each class; commas separate several."
)
_NUM_QUERIES = flags.DEFINE_integer(
    "num_queries", 15, "Query images of each class in an episode.", 1
)
_NUM_EPISODES = flags.DEFINE_integer(
    "num_episodes", 2000, "Episodes for each number of ways and shots.", 2
)
_SEED = flags.DEFINE_integer("seed", 0, "Seeds the episodes.", 0, 2**32 - 1)
_HEAD = flags.DEFINE_string(
    "head", _DEFAULTS.head, f"Classifier: {', '.join(transfer_evaluation.HEAD_NAMES)}."
)
_FEATURES = flags.DEFINE_string(
    "features",
    _DEFAULTS.features,
    f"What is done to embeddings first: {', '.join(transfer_evaluation.FEATURE_OPTIONS)}.",
)
_REGULARIZATION = flags.DEFINE_float(
    "regularization", _DEFAULTS.regularization, "Strength, for ridge and logistic_regression."
)
_FINE_TUNING_STEPS = flags.DEFINE_integer(
    "fine_tuning_steps", _DEFAULTS.fine_tuning_steps, "SGD steps in each episode.", lower_bound=0
)
_FINE_TUNING_LEARNING_RATE = flags.DEFINE_float(
    "fine_tuning_learning_rate",
    _DEFAULTS.fine_tuning_learning_rate,
    "Learning rate of these steps.",
    lower_bound=0,
)


def main(argv: list[str]) -> None:
    """Evaluates one run or ranks several."""
    del argv
    if bool(_WORKDIR.value) == bool(_RUNS.value):
        raise InputError("give --workdir, the folder of a run, or --runs, a folder of runs")
    protocol = Protocol(
        _SPLIT.value,
        _NUM_EPISODES.value,
        _NUM_QUERIES.value,
        _SEED.value,
        _HEAD.value,
        _FEATURES.value,
        _REGULARIZATION.value,
        _FINE_TUNING_STEPS.value,
        _FINE_TUNING_LEARNING_RATE.value,
    )
    sizes = [
        (ways, shots)
        for ways in _numbers("num_ways", _NUM_WAYS.value, 2)
        for shots in _numbers("num_shots", _NUM_SHOTS.value, 1)
    ]
    if _WORKDIR.value:
        workdirs = [Path(_WORKDIR.value).expanduser()]
    else:
        if _STEP.value == "all":
            raise InputError("--runs compares runs at one step each; give --step=latest or a step")
        workdirs = transfer_results.find_runs(Path(_RUNS.value).expanduser())
    datasets = {}
    plans = [_plan(workdir, datasets, protocol, sizes) for workdir in workdirs]
    transfer_results.check_comparable([run for run, _, _ in plans], protocol.split)
    records = _evaluate(plans, protocol)
    for record in records:
        print(transfer_results.table(record))
    if _RUNS.value:
        folder = Path(_RUNS.value).expanduser()
        print(transfer_results.rank_runs(records, folder, protocol))


def _numbers(name: str, texts: list[str], least: int) -> list[int]:
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise InputError(
            f"--{name}={','.join(texts)} must be numbers of at least {least}, as in 5 or 5,20"
        )
    return list(dict.fromkeys(numbers))


def _plan(
    workdir: Path, datasets: dict, protocol: Protocol, sizes: list[tuple[int, int]]
) -> tuple[FinishedRun, tuple[int, ...], list[Task]]:
    """Whatever may be wrong with a run is found here, before any work."""
    run = open_run(workdir, _DATA_DIR.value, datasets=datasets)
    steps = run.select_steps(_STEP.value)
    for step in steps:
        run.check_checkpoint(step)
    transfer_results.read_results(workdir)
    return run, steps, transfer_evaluation.sample_tasks(run, protocol, sizes)


def _evaluate(plans, protocol: Protocol) -> list[transfer_results.RunRecord]:
    count = transfer_evaluation.num_reports
    fine_tunings = protocol.num_episodes if protocol.head == FINE_TUNING else 0
    total = sum(
        count(len(steps), len(tasks)) + len(steps) * len(tasks) * fine_tunings
        for _, steps, tasks in plans
    )
    records = []
    # None: no bar in a pipe, where its carriage returns would only litter.
    with tqdm(total=total, unit="part", dynamic_ncols=True, disable=None) as bar:
        for run, steps, tasks in plans:
            record = transfer_results.RunRecord(run.workdir, run.config, {}, [])
            for step in steps:

                def report(part, where=f"{run.workdir.name} step {step}"):
                    bar.set_description(f"{where}: {part}", refresh=False)
                    bar.update()

                source, results = transfer_evaluation.evaluate_checkpoint(
                    run,
                    step,
                    protocol,
                    tasks,
                    gc_examples=_GC_EXAMPLES.value,
                    gc_probes=_GC_PROBES.value,
                    report=report,
                    save=lambda source, result, run=run, step=step: transfer_results.add_results(
                        run.workdir, step, source, [result]
                    ),
                )
                record.source[step] = source
                record.results.extend(results)
            transfer_results.draw(record, run, protocol)
            records.append(record)
    return records


if __name__ == "__main__":
    launcher.run(main)

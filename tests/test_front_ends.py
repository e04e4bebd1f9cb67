"""One objective, four front ends, the same numbers: own loop, `limbeck.fit`, transformers' Trainer, Lightning."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from limbeck import Distiller, Settings, Term, fit
from limbeck.train.hf import DistillationTrainer
from limbeck.train.loop import seed_everything
from limbeck.types import Output
from tests.models import bert

lightning = pytest.importorskip("lightning.pytorch")

from limbeck.train.lightning import DistillationModule  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning's, of a newer torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
]

STEPS, BATCH, SEED, RATE = 20, 8, 3, 2e-3
EPSILON = 1e-4
"""Some gradients are zero but for rounding (of attention's key biases), and Adam would make steps of them."""

SETTINGS = Settings(
    batch_size=BATCH,
    learning_rate=RATE,
    optimizer_options={"eps": EPSILON},
    weight_decay=0.1,
    warmup=0,
    clip=0.5,
    seed=SEED,
)


def data(count=37):
    """Texts of different lengths with a label for each token; some tokens have none. The last batch is short."""
    generator = torch.Generator().manual_seed(9)
    found = []
    for i in range(count):
        ids = torch.randint(3, 40, (3 + i * 7 % 9,), generator=generator)
        labels = torch.where(ids % 4 == 0, -100, ids % 3)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def padded(examples):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.nn.utils.rnn.pad_sequence([e[key] for e in examples], batch_first=True, padding_value=fill[key])
        for key in fill
    }


def loader(size=BATCH):
    """In order; it draws from a generator of its own what loaders draw at the start of an epoch."""
    return DataLoader(data(), size, collate_fn=padded, generator=torch.Generator())


def made(dropout):
    """A Distiller with a projection, a scheduled weight and three masks, and what it finds in each call."""
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "initializer_range": 0.1}
    kind = "BertForTokenClassification"
    student, teacher = bert(1, 8, seed=1, kind=kind, **options), bert(2, 16, seed=2, kind=kind)
    terms = [
        Term(
            "logits",
            loss="forward_kl",
            temperature=2.0,
            weight={"schedule": "linear", "start": 1.0, "end": 0.2},
            name="kd",
        ),
        Term("hidden_states.1", "hidden_states.2", loss="mse", project="linear", weight=0.3, name="hidden"),
        Term("labels", loss="cross_entropy", weight=0.5),
    ]
    distiller, losses = Distiller(student, teacher, terms), []
    distiller.register_forward_hook(
        lambda _, __, out: losses.append(out.loss.item()) if isinstance(out, Output) else None
    )
    return distiller, losses


def own_loop(distiller, parts, _):
    seed_everything(SEED)
    distiller.preflight(padded(data()[:2]))
    optimizer = SETTINGS.build_optimizer(distiller.student, distiller.objective)
    seed_everything(SEED)
    distiller.train()
    step = 0
    while step < STEPS:
        batches = list(loader(BATCH // parts))
        for start in range(0, len(batches), parts):
            together = batches[start : start + parts]
            counts = [distiller.count(batch) for batch in together]
            counts = {key: sum(one[key] for one in counts) for key in counts[0]}
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / STEPS)
            for batch in together:
                distiller(**batch, counts=counts, progress=step / (STEPS - 1)).loss.backward()
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def by_fit(distiller, parts, _):
    fit(distiller, loader(), settings=SETTINGS.model_copy(update={"steps": STEPS, "accumulation": parts}))


class Seeded(TrainerCallback):
    """Trainer draws at its start what others do not."""

    def on_train_begin(self, args, state, control, **_):
        seed_everything(SEED)


class InOrder(DistillationTrainer):
    """Trainer's own loader draws from the generator that dropout draws from."""

    def get_train_dataloader(self):
        return loader(self.args.per_device_train_batch_size)


def by_trainer(distiller, parts, folder):
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // parts,
        gradient_accumulation_steps=parts,
        learning_rate=RATE,
        weight_decay=0.1,
        adam_epsilon=EPSILON,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
        seed=SEED,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    InOrder(distiller, arguments, train_dataset=data(), callbacks=[Seeded()]).train()


def by_lightning(distiller, parts, _):
    module = DistillationModule(distiller, SETTINGS.model_copy(update={"accumulation": parts}))
    trainer = lightning.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(BATCH // parts))


FRONT_ENDS = {"fit": by_fit, "trainer": by_trainer, "lightning": by_lightning}


def trained(front_end, dropout, parts, folder):
    """The loss of each step, the sum over its parts, and all weights afterwards."""
    distiller, losses = made(dropout)
    front_end(distiller, parts, folder)
    return torch.tensor(losses).view(STEPS, parts).sum(1), copy.deepcopy(distiller.state_dict())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the own loop gives, once for each setting."""
    found = {}

    def of(*setting):
        if setting not in found:
            found[setting] = trained(own_loop, *setting, tmp_path_factory.mktemp("own"))
        return found[setting]

    return of


@pytest.mark.parametrize(("dropout", "parts"), [(0.0, 1), (0.2, 1), (0.0, 2)])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_same_numbers(front_end, dropout, parts, expected, tmp_path):
    losses, weights = expected(dropout, parts)
    its_losses, its_weights = trained(FRONT_ENDS[front_end], dropout, parts, tmp_path)
    torch.testing.assert_close(its_losses, losses, rtol=0, atol=1e-6)
    assert its_weights.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            its_weights[name], weight, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_parts_change_nothing(expected):
    """The parts of a step add up to it, also where the last one has a single example."""
    losses, weights = expected(0.0, 1)
    its_losses, cut = expected(0.0, 2)
    torch.testing.assert_close(its_losses, losses, rtol=0, atol=1e-6)
    assert max(float((cut[name] - weight).abs().max()) for name, weight in weights.items()) < 1e-6


def test_the_comparison_can_fail(expected):
    """Dropout alone moves the losses by far more than the tolerance, and training changes the weights."""
    losses, weights = expected(0.0, 1)
    assert float((losses - expected(0.2, 1)[0]).abs().max()) > 1e-3
    before = made(0.0)[0].student.state_dict()
    assert (
        max(float((weights[f"student.{n}"] - w).abs().max()) for n, w in before.items() if w.is_floating_point())
        > 1e-3
    )

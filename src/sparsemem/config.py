"""Options, described once: the text under a field is its help on the command line and in the docs."""

import ast
import dataclasses
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from sparsemem.errors import ConfigError

ConfigT = TypeVar("ConfigT")

MAX_NAMES = 2**24
"""So many whole numbers float32 tells apart."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """Shape and place of the memory that is added to a model."""

    layers: tuple[int, ...] | Literal["auto"] = "auto"
    """Blocks that get a memory, counted from 0; "auto" is one at 13 % of the depth."""
    output_depth: float | None = None
    """Share of the model's depth at which the memory answers: what a name stands for is looked up early,
    where names are read, and learned late, where little has to be run. By default 0.78, where what is asked
    is plain, or 0.67 with relation_dim=0. 0 adds what is read where it was read, as does
    placement="replace"."""
    placement: Literal["add", "replace"] = "add"
    """Beside the feed-forward network (logits unchanged at attach), or gated in its place."""
    num_keys: int = 1024
    """Sub-keys per half; the pool has num_keys**2 slots."""
    num_heads: int = 16
    """Independent lookups per token."""
    top_k: int = 8
    """Slots read per head and token."""
    query_dim: int = 16
    """Width of half a key."""
    quorum: float = 0.33
    """Share of a token's reads that must find one and the same row for its full answer; from half as many on
    they get part of it, and with 0 every read counts alone. Of no effect with a base table."""
    value_dim: int | None = None
    """Width of a row; only placement="replace" may differ from the model's width."""
    relation_dim: int | None = None
    """Numbers of a row that say which question about its name it answers: several facts about one name are
    told apart by them, and what else is asked about it stays as it was. By default as many as the model is
    wide, where one memory answers above its reads; with 0 a row answers whatever is asked."""
    shared_pool: bool = False
    """All memory layers read one pool instead of one each."""
    blocks: str = "auto"
    """Path of the list of blocks inside the model, for families not known here: "model.layers"."""
    ffn: str = "auto"
    """Path of the feed-forward network inside a block: "mlp", or "fc1..fc2" from first to last module."""
    seed: int = 0
    """Seed of the random queries and keys."""

    def __post_init__(self) -> None:
        if self.layers != "auto" and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ConfigError(f"layers={self.layers} names no block or one twice; pass e.g. layers=(4,)")
        _check_choices(self)
        _check_positive(self, "num_keys", "num_heads", "top_k", "query_dim")
        if not 0 <= self.quorum <= 1:
            raise ConfigError(f"quorum={self.quorum} is not a share; use 0 to 1")
        if self.output_depth is not None and not 0 <= self.output_depth < 1:
            raise ConfigError(f"output_depth={self.output_depth} is not a share below 1; use 0 to 0.99")
        if self.value_dim is not None:
            _check_positive(self, "value_dim")
        self._check_relations()
        if self.top_k > self.num_keys**2:
            raise ConfigError(
                f"top_k={self.top_k} exceeds the {self.num_keys**2} slots; lower it or raise num_keys"
            )

    def _check_relations(self) -> None:
        if not self.relation_dim:
            return
        _check_positive(self, "relation_dim")
        if not self.can_relate:
            raise ConfigError(
                f"relation_dim={self.relation_dim} needs one memory layer with placement='add', a quorum, an "
                f"output_depth and at most {MAX_NAMES} slots; or use relation_dim=0"
            )

    @property
    def can_relate(self) -> bool:
        """Whether rows can belong to names: one memory reads them, with a quorum, and answers above."""
        one_layer = self.layers == "auto" or len(self.layers) == 1
        is_above = self.placement == "add" and self.output_depth != 0
        return one_layer and is_above and self.quorum > 0 and self.num_slots <= MAX_NAMES

    @property
    def num_slots(self) -> int:
        """Slots of one pool."""
        return self.num_keys**2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """Where a model is put, and how exact its weights are. A memory in it is float32 all the same."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ... as in torch; "auto" is a GPU of CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights. In bfloat16 a model takes half the room, and a name may read a few other slots
    than in float32: learn and ask in the same."""

    def __post_init__(self) -> None:
        _check_choices(self)

    def options(self) -> dict[str, str]:
        """Return it as keyword arguments of `sparsemem.load` and `load_base_model`."""
        return dataclasses.asdict(self)


DEFAULT_LEARNING_RATES = {"memory": 0.2, "full": 5e-5}
PEFT_LEARNING_RATE = 5e-4
MEMORY_OPTIONS = {
    "top_t", "ranking", "max_document_frequency", "anchor", "tie_rows", "weighted_reads",
    "prefix_cache_bytes", "adam_axes", "average_from", "extrapolate", "memory", "attach",
}  # fmt: skip
"""Options of a run that mean nothing to other methods."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How facts are trained."""

    method: str = "memory"
    """What may move: "memory", "full", or a PEFT type by its name ("lora", "ia3", ...)."""
    top_t: int = 256
    """Slots trained per fact, chosen by `ranking` among the slots the batch reads."""
    ranking: Literal["tf_idf", "tf", "kl", "random"] = "tf_idf"
    """Which of the slots read are a fact's own: "tf_idf" (Lin et al. 2025), "tf", "kl", or by lot."""
    max_document_frequency: float | None = None
    """Slots that a larger share of the background's documents reads are never trained; by default 1.5 times
    the share that reads the mean slot, which is 2 % with the memory's own defaults."""
    anchor: Literal["subject", "subject_tail", "subject_end", "all"] = "subject_tail"
    """Rank the slots read at the subject (all its tokens, all but the first, the last), or anywhere."""
    tie_rows: bool = True
    """The slots of a fact hold one row, so that it says the same wherever it is read; of facts that have a
    subject. In the paper each slot has its own."""
    weighted_reads: bool = True
    """A read counts by its weight; the paper counts each as one."""
    learning_rate: float | None = None
    """Step size; by default 0.2 for memory, 5e-5 for full, 5e-4 for PEFT methods."""
    lr_scheduler: str = "constant"
    """Schedule by its name in transformers: "constant", "linear", "cosine", ..."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Stepped on the rows that were chosen, or on the parameters of the method."""
    adam_beta1: float | None = None
    """How much of its mean gradient "adamw" keeps from step to step; by default 0.5 for memory, whose slots
    see a dozen or two steps each, and 0.9 for all other methods."""
    adam_axes: Literal["fisher", "rows"] = "fisher"
    """Axes along which "adamw" scales the steps of a memory: the eigenvectors of the Fisher information of
    background text, or the numbers of a row as they are."""
    momentum: float = 0.0
    """Momentum of "sgd"."""
    weight_decay: float = 0.0
    """Weight decay of either optimizer."""
    average_from: float = 0.5
    """Share of its steps from which on a fact's row counts to the mean it ends as; 1 for no mean. Untied rows
    have none."""
    extrapolate: float = 1.2
    """How far from where it began a fact's row ends, relative to that mean: it is on its way still."""
    num_epochs: int = 12
    """Passes over the facts."""
    facts_per_batch: int = 8
    """Facts per optimizer step; slots are chosen for each of them."""
    stream: bool = False
    """Batches of facts one after another: all epochs of one before the next, none seen again."""
    wordings_per_step: int = 2
    """Wordings of each fact in one step, drawn anew each time; all of them where there are no more. A memory
    learns more from more steps than from more wordings in each."""
    held_per_step: int = 1
    """Texts of each fact in one step from which nothing is learned, while "local_kl" holds what they predict:
    other questions about its subject, and wordings that give the answer first, which no memory can learn."""
    gradient_accumulation_steps: int = 1
    """Parts a batch is computed in; slots are chosen for the whole batch."""
    num_contexts: int = 1
    """Left contexts each wording is trained in; every second one is empty."""
    read_documents: bool = True
    """Ask for the names and numbers of a document by their sentences, in place of learning it whole."""
    num_own_paraphrases: int = 0
    """Rewordings per fact that the model is asked for itself, 0 to 4; kept if they say the same."""
    loss_on: Literal["answer", "all"] = "answer"
    """Learn the tokens of the answer, or all tokens."""
    max_length: int = 512
    """Longer wordings are cut."""
    prefix_cache_bytes: int = 2 * 1024**3
    """Memory for what never changes of a wording, so that it is computed once: states below the memory,
    and all before the subject. What is beyond it is kept on disk, in files of TMPDIR; 0 keeps nothing."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Compute in bfloat16 what allows it; weights and rows stay float32."""
    penalty: Literal["auto", "none", "ewc", "kl", "local_kl"] = "auto"
    """Pull to the model before: by its weights ("ewc", method="full" only), its predictions on background
    text ("kl"), or on the wordings, but for the answer, and other questions about the subject ("local_kl");
    "auto" is "local_kl" for memory, else "none"."""
    penalty_weight: float | None = None
    """Weight of the penalty beside the loss; by default 0.3 for "local_kl", 1 for the others."""
    replay_fraction: float = 0.0
    """Share of background text among the sequences of a step, trained on all its tokens."""
    peft: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the PEFT config, such as {"r": 32, "lora_alpha": 64}."""
    seed: int = 0
    """Seed of the order of facts, of what is drawn of their wordings and contexts, and of adapters."""

    def __post_init__(self) -> None:
        _check_choices(self)
        counts = ("top_t", "num_epochs", "facts_per_batch", "wordings_per_step", "num_contexts")
        _check_positive(self, *counts, "gradient_accumulation_steps", "max_length")
        if not 0 <= self.num_own_paraphrases <= 4:
            raise ConfigError(f"num_own_paraphrases={self.num_own_paraphrases} is not within 0 to 4")
        if self.learning_rate is not None:
            _check_positive(self, "learning_rate")
        if not 0 <= self.replay_fraction < 1:
            raise ConfigError(f"replay_fraction={self.replay_fraction} is not a share; use 0 to below 1")
        if self.max_document_frequency is not None:
            _check_positive(self, "max_document_frequency")
            if self.max_document_frequency > 1:
                raise ConfigError(
                    f"max_document_frequency={self.max_document_frequency} is not a share; use 1 for no limit"
                )
        if self.penalty == "ewc" and self.method != "full":
            raise ConfigError(
                f"penalty='ewc' does not suit method={self.method!r}: what that trains starts as nothing, so "
                "its Fisher information says nothing of the base; use penalty='kl' or method='full'"
            )
        if self.adam_beta1 is not None and not 0 <= self.adam_beta1 < 1:
            raise ConfigError(f"adam_beta1={self.adam_beta1} is not a share; use 0 to below 1")
        if not 0 <= self.average_from <= 1:
            raise ConfigError(f"average_from={self.average_from} is not a share; use 0 to 1")
        _check_positive(self, "extrapolate")
        if not self.held_per_step >= 0:
            raise ConfigError(f"held_per_step={self.held_per_step} is negative; use 0 or more")
        if self.penalty_weight is not None and not self.penalty_weight >= 0:
            raise ConfigError(f"penalty_weight={self.penalty_weight} is negative; use 0 or more")

    @property
    def is_guarded(self) -> bool:
        """Whether background text is to hold the model back: by a penalty or replay."""
        return self.penalty in ("ewc", "kl") or self.replay_fraction > 0

    @property
    def kind_of_penalty(self) -> str:
        """The penalty, or the default of the method."""
        if self.penalty != "auto":
            return self.penalty
        return "local_kl" if self.method == "memory" else "none"

    @property
    def is_local(self) -> bool:
        """Whether the facts' own texts are to hold the model back."""
        return self.kind_of_penalty == "local_kl"

    @property
    def is_anchored(self) -> bool:
        """Whether what is learned is written at the subject of a fact that has one."""
        return self.method == "memory" and self.anchor != "all"

    @property
    def reads_documents(self) -> bool:
        """Whether documents are made facts; in a stream each row that is given has its turn."""
        return self.read_documents and not self.stream

    @property
    def ties_rows(self) -> bool:
        """Whether the slots of a fact that has a subject move as one."""
        return self.tie_rows and self.is_anchored

    @property
    def holds_others(self) -> bool:
        """Whether other questions about a subject are asked, to be held.

        Of a memory they choose slots too; where any token does, theirs must not.
        """
        return self.is_local and self.held_per_step > 0 and (self.method != "memory" or self.is_anchored)

    @property
    def strength(self) -> float:
        """Weight of the penalty."""
        if self.penalty_weight is not None:
            return self.penalty_weight
        return 0.3 if self.is_local else 1.0

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of the moments of "adamw"."""
        beta1 = self.adam_beta1
        if beta1 is None:
            beta1 = 0.5 if self.method == "memory" else 0.9
        return beta1, 0.999

    @property
    def lr(self) -> float:
        """The learning rate, or the default of the method."""
        if self.learning_rate is not None:
            return self.learning_rate
        return DEFAULT_LEARNING_RATES.get(self.method, PEFT_LEARNING_RATE)


def applicable(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of some options of training, and leave out what means nothing to their method.

    So two runs of one setting have the same, whatever was written down when they ran.

    Args:
        options: Options of `FinetuneConfig`, as plain JSON values; others stay as they are.
    """
    # What was written down before there were these had none.
    options = {"average_from": 1.0, "extrapolate": 1.0, **options}
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    config = from_json(FinetuneConfig, {name: options[name] for name in options.keys() & names}, "config")
    values = to_json(config) | {"learning_rate": config.lr, "penalty": config.kind_of_penalty}
    values |= {"adam_beta1": config.betas[0], "penalty_weight": config.strength}
    idle = set() if config.method == "memory" else MEMORY_OPTIONS
    idle |= set() if config.ties_rows else {"average_from", "extrapolate"}
    idle |= {"momentum"} if config.optimizer == "adamw" else {"adam_beta1"}
    idle |= {"penalty_weight"} if values["penalty"] == "none" else set()
    idle |= set() if config.is_local else {"held_per_step"}
    return {name: value for name, value in (options | values).items() if name not in idle}


def to_json(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_json(cls: type[ConfigT], values: dict[str, Any], source: Path | str) -> ConfigT:
    """Build a config dataclass from JSON values; unknown names are an error that names them.

    Raises:
        ConfigError: `values` has a name that `cls` has not.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{source}: unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    lists_as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**lists_as_tuples)
    except TypeError as error:
        raise ConfigError(
            f"{source}: an option has a value of the wrong type ({error}); correct it"
        ) from error


def field_docs(cls: type) -> dict[str, str]:
    """Read the text under each field of a config dataclass.

    Returns:
        Field name to its text, in one line.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return docs


def _check_choices(config: Any) -> None:
    for field in dataclasses.fields(config):
        choices, value = get_args(field.type), getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in choices:
            raise ConfigError(f"{field.name}={value!r} is unknown; use one of {', '.join(choices)}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}={getattr(config, name)} is not positive; use a larger one")

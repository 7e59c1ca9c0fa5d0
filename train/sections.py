"""The sections of a recipe: what each may hold, of which type, with which default.

An objective's section names its parameters; what it minimises is the function of that `kind` in
`train/objectives.py`, or a function of the user's own where `kind` is `module:function`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from cwdpo_bench.errors import UserError


class Section(BaseModel):
    """Keys of one mapping in a recipe; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cooling(Section):
    """The weight w_c of the loser's term.

    `memory` is that of `auto-track`, in pairs; `fixed` is a weight for all answers instead.
    """

    floor: float | Literal["auto", "auto-track"] = "auto"
    tau: Annotated[float, Field(gt=0)] | Literal["auto", "auto-track"] = "auto"
    detach: bool = True
    memory: Annotated[int, Field(gt=0)] = 256
    fixed: Annotated[float, Field(ge=0, le=1)] | None = None


class _Term(Section):
    weight: float = 1.0


class CiderDTerm(_Term):
    """CIDEr-D against the row's references, 0 to 10; document frequencies from all rows."""

    kind: Literal["cider-d"]


class ExactMatchTerm(_Term):
    """1 where the answer is a reference but for case, spacing and a full stop, else 0."""

    kind: Literal["exact-match"]


class OptionCorrectTerm(_Term):
    """1 where the answer names the right option of those in the prompt, else 0."""

    kind: Literal["option-correct"]


class LengthTerm(_Term):
    """−|L − L*| / L*, L words of the answer, L* `words` or the mean of the row's references."""

    kind: Literal["length"]
    words: Annotated[int, Field(gt=0)] | Literal["references"] = "references"


class CallableTerm(_Term):
    """A function of the user's own, `module:function`; see `train/rewards.py` for its arguments."""

    kind: Literal["callable"]
    function: Annotated[str, StringConstraints(pattern=r"^[\w.]+:\w+$")]


RewardTerm = Annotated[
    CiderDTerm | ExactMatchTerm | OptionCorrectTerm | LengthTerm | CallableTerm,
    Field(discriminator="kind"),
]


class Filter(Section):
    """Which pairs a stage leaves out because their rejected answer is extremely easy.

    Under `below` (nats a token) or in the lowest `quantile` of ℓ̄_ref(y_l).
    """

    quantile: Annotated[float, Field(ge=0, lt=1)] | None = None
    below: float | None = None


class Sampling(Section):
    """How answers are drawn from the policy."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Annotated[int, Field(gt=0)] = 64


class OnPolicy(Sampling):
    """Rejected answers drawn from the policy for a `share` of the pairs, anew every N steps."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    every: Annotated[int, Field(gt=0)] = 100
    rewards: list[RewardTerm] = [CiderDTerm(kind="cider-d")]


class _Objective(Section):
    trainer: dict[str, Any] = {}


class _Preference(_Objective):
    filter: Filter | None = None
    on_policy: OnPolicy | None = None


class SFT(_Objective):
    """Plain supervised fine-tuning on the chosen answers."""

    kind: Literal["sft"]
    nll: Literal["mean", "sum"] = "mean"


class SFTC(_Objective):
    """Constrained smooth SFT; `lambda` and `threshold` are λ and C."""

    kind: Literal["sft-c"]
    nll: Literal["mean", "sum"] = "mean"
    weight: Annotated[float, Field(ge=0, alias="lambda")] = 0.1
    threshold: float | Literal["auto"] = "auto"


class HardConstraint(_Objective):
    """Constrained SFT by a switching subgradient; `threshold` is C."""

    kind: Literal["hard-constraint"]
    nll: Literal["mean", "sum"] = "mean"
    threshold: float | Literal["auto"] = "auto"


class DPO(_Preference):
    """Direct preference optimization."""

    kind: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1


class CWDPO(_Preference):
    """The cooled preference loss."""

    kind: Literal["cw-dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    cooling: Cooling = Cooling()


class VDPO(_Preference):
    """Vision-guided DPO; `gamma` is γ, the strength of the guidance."""

    kind: Literal["v-dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    gamma: Annotated[float, Field(ge=1)] = 1.5


class OPASFT(_Objective):
    """Stage 1 of OPA-DPO: on the references and on the policy's own answers, corrected."""

    kind: Literal["opa-sft"]
    nll: Literal["mean", "sum"] = "mean"
    own: Sampling = Sampling()


class OPADPO(_Objective):
    """Stage 2 of OPA-DPO: own answers against the references and their corrections."""

    kind: Literal["opa-dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    mask_weight: Annotated[float, Field(ge=0)] = 0.2
    anchor_weight: Annotated[float, Field(ge=0)] = 1.0
    own: Sampling = Sampling()


class PPO(_Objective):
    """Proximal policy optimization on sampled answers; names as in `train/policy_gradient.py`."""

    kind: Literal["ppo"]
    rewards: Annotated[list[RewardTerm], Field(min_length=1)]
    rollout_size: Annotated[int, Field(gt=0)] = 64
    epochs: Annotated[int, Field(gt=0)] = 4
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    sample_batch_size: Annotated[int, Field(gt=0)] = 16
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05
    target_kl: Annotated[float, Field(gt=0)] | None = 0.05
    stop_kl: Annotated[float, Field(gt=0)] | None = None
    clip: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] | None = None
    value_coefficient: Annotated[float, Field(ge=0)] = 0.1
    value_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1, alias="lambda")] = 0.95
    whiten_rewards: bool = True


class GRPO(_Objective):
    """TRL's group-relative policy optimization; its parameters are `trainer:` fields."""

    kind: Literal["grpo"]
    rewards: Annotated[list[RewardTerm], Field(min_length=1)]


class Custom(_Preference):
    """A function of the user's own; its keyword-only parameters are the section's other keys."""

    model_config = ConfigDict(extra="allow")

    kind: Annotated[str, StringConstraints(pattern=r"^[\w.]+:\w+$")]
    nll: Literal["mean", "sum"] = "mean"

    @model_validator(mode="after")
    def _keys_of_the_function(self) -> Custom:
        # Reading a recipe of built-in kinds does not load torch.
        from cwdpo_bench.train.terms import check_custom

        try:
            check_custom(self.kind, self.model_extra or {})
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


def _tag(section: Any) -> str:
    kind = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", None)
    return "custom" if isinstance(kind, str) and ":" in kind else str(kind)


Objective = Annotated[
    Annotated[SFT, Tag("sft")]
    | Annotated[SFTC, Tag("sft-c")]
    | Annotated[HardConstraint, Tag("hard-constraint")]
    | Annotated[DPO, Tag("dpo")]
    | Annotated[CWDPO, Tag("cw-dpo")]
    | Annotated[VDPO, Tag("v-dpo")]
    | Annotated[OPASFT, Tag("opa-sft")]
    | Annotated[OPADPO, Tag("opa-dpo")]
    | Annotated[PPO, Tag("ppo")]
    | Annotated[GRPO, Tag("grpo")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(_tag),
]


class Data(Section):
    """How the preference rows are read and shared among the stages."""

    on_bad_row: Literal["stop", "skip"] = "stop"
    format: str = "auto"
    image_root: str | None = None
    stage1_share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    stages: Literal["disjoint", "shared"] = "disjoint"
    pixel_cache_gb: Annotated[float, Field(ge=0)] = 8.0
    curriculum: Literal["none", "easy_to_hard", "hard_to_easy"] = "none"
    easiness: Literal["rejected", "margin"] = "rejected"

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        from cwdpo_bench.train.layouts import checked_layout

        try:
            return checked_layout(name, "data.format")
        except UserError as error:
            raise ValueError(str(error)) from error


class Model(Section):
    """How the model is loaded; `load_in_4bit` is QLoRA's base, see `vlm/quantized.py`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    freeze_vision: bool | Literal["auto"] = "auto"


class Lora(Section):
    """Low-rank adapters (peft); off means full fine-tuning."""

    enabled: bool = False
    r: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[int, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    dora: bool = False
    target_modules: str | list[str] = (
        r".*(language_model|text_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )


class Answers(Section):
    """The probe's other answers: on how many pairs, and every how many measurements."""

    every: Annotated[int, Field(gt=0)] = 6
    pairs: Annotated[int, Field(ge=0)] = 8


class InfluenceProbe(Section):
    """The influence decomposition: on how many pairs, every how many measurements, how long a step.

    `step` bounds the change of an average answer's ℓ̄, nats a token.
    """

    every: Annotated[int, Field(gt=0)] = 6
    pairs: Annotated[int, Field(ge=0)] = 2
    step: Annotated[float, Field(gt=0)] = 0.01


class VerdictRules(Section):
    """Thresholds of the verdict, see `train/verdict.py`: nats a token, and counts."""

    fall: Annotated[float, Field(gt=0)] = 0.1
    rise: Annotated[float, Field(ge=0)] = 0.02
    errors: Annotated[float, Field(ge=0)] = 2.0
    persist: Annotated[int, Field(gt=0)] = 2


class Dynamics(Section):
    """The probe: how often, on how many held-out pairs, what is told, and what stops a stage."""

    every: Annotated[int, Field(gt=0)] = 50
    pairs: Annotated[int, Field(gt=0)] = 48
    answers: Answers = Answers()
    influence: InfluenceProbe = InfluenceProbe()
    verdict: VerdictRules = VerdictRules()
    stop_on: list[Literal["squeezing", "delta_logp"]] = []
    patience: Annotated[int, Field(gt=0)] = 3

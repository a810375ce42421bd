"""Kinds of adapters that cannot be trained here, or would be saved as something else: refused with the way out."""

from __future__ import annotations

from peft import PeftConfig, PeftType

LORA = "Use LoRA (also with use_dora, use_rslora, or another rank by rank_pattern)."
BY_TASK = ("needs a task id for each row, and preference pairs have none", "Use prompt tuning or LoRA.")

KINDS: dict[str, tuple[str, str]] = {
    PeftType.ADALORA: (
        "prunes its ranks from within the training loop and adds a loss of its own for orthogonality, and this loop does neither: it "
        "would train as LoRA of rank init_r",
        LORA,
    ),
    PeftType.SHADOW: ("adds a loss of its own that reads labels, and preference pairs have none", LORA),
    PeftType.XLORA: ("mixes adapters by a pass of its own through the model, and has no model without them", LORA),
    PeftType.MULTITASK_PROMPT_TUNING: BY_TASK,
    PeftType.POLY: BY_TASK,
}
"""{kind: (what stands against it, the way out)}"""

PLAIN = "Use init_lora_weights=True or 'pissa'."
CONVERTED = (
    "moves a part of the base into the adapter, and PEFT cannot find that part again where the saved adapter is loaded",
    f"{PLAIN} Or save the base as it is now (model.get_base_model() with the adapter deleted), and put an adapter with "
    "init_lora_weights=True and these weights on it.",
)
INITIALISATIONS: dict[str, tuple[str, str]] = {
    "pissa_niter": (
        "moves a part of the base into the adapter by a random SVD, which comes out otherwise where the saved adapter is loaded",
        "Use init_lora_weights='pissa', whose SVD repeats.",
    ),
    "loftq": (
        "puts quantised weights in the place of the base's and does so again, on a GPU, where the saved adapter is loaded",
        "Load the model in 4 bits, put LoRA on it, call peft.replace_lora_weights_loftq(model), and hand it over as the model.",
    ),
    "corda": CONVERTED,
    "lora_ga": CONVERTED,
}
"""{start of init_lora_weights: (what stands against it, the way out)}"""

FIELDS: dict[str, tuple[str, str]] = {
    "layer_replication": (
        "makes another model of the base, with layers twice, which no reference is",
        "Build and save the deeper model first, and train an adapter on it.",
    ),
    "kasa_config": ("comes with two losses of its own, which this loop does not add", LORA),
    "monteclora_config": ("comes with a loss of its own, which this loop does not add", LORA),
}
"""{field of LoraConfig: (what stands against it, the way out)}"""


def refuse_adapter_kind(config: PeftConfig, *, fresh: bool, gradient_checkpointing: bool) -> None:
    """Raise ValueError for an adapter that would not train as its settings say, or not be saved as what it is.

    Args:
        fresh: it is to be made from `config`, and was not initialised by the user.
        gradient_checkpointing: of the layers, in this run.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if found := KINDS.get(config.peft_type or ""):
        _refuse(f"The adapter kind {kind}", found)
    init = str(getattr(config, "init_lora_weights", ""))
    for start, found in INITIALISATIONS.items():
        if init.startswith(start):
            _refuse(f"init_lora_weights={init!r}", found)
    if fresh and init == "eva":
        _refuse(
            "init_lora_weights='eva'",
            (
                "needs activations of the model on data, and would begin as plain LoRA without them",
                "Make the PeftModel, call peft.initialize_lora_eva_weights(model, dataloader), and hand it over as the model.",
            ),
        )
    for name, found in FIELDS.items():
        if getattr(config, name, None):
            _refuse(name, found)
    if not gradient_checkpointing:
        return
    way_out = "Set --gradient_checkpointing false."
    if config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
        against = "keeps its vectors in the cache of keys and values, which layer checkpointing switches off"
        _refuse(f"The adapter kind {kind}", (against, way_out))
    if getattr(config, "alora_invocation_tokens", None):
        against = "allows one forward pass before each backward pass under layer checkpointing, and a reference may need its own"
        _refuse("aLoRA (alora_invocation_tokens)", (against, way_out))


def _refuse(what: str, found: tuple[str, str]) -> None:
    against, way_out = found
    raise ValueError(f"{what} {against}. {way_out}")

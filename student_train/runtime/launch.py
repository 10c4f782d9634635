"""What `accelerate launch` and DeepSpeed's own file may say: honoured, or refused at the start."""

from collections.abc import Mapping
from typing import Any

from transformers.integrations import unset_hf_deepspeed_config

from decant.student_train.config.run import TrainConfig

SPLITS_OF_A_MODEL = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor",
    "PARALLELISM_CONFIG_CP_SIZE": "context",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence",
}
"""Variables of `accelerate launch` that split one sequence or one matrix over devices."""


def refuse_launch(config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Raise ValueError if what `accelerate launch` or its saved config asks for has no effect here.

    It comes as variables of the environment, which accelerate heeds by itself.
    """

    def asked(name: str, default: str) -> str:
        return environment.get(name, default).lower() or default

    precision = asked("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.mixed_precision):
        raise ValueError(
            f"accelerate was launched with mixed_precision {precision}, this config has "
            f"{config.mixed_precision}: set mixed_precision here, and no (or the same) there"
        )
    accumulation = asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", str(config.gradient_accumulation)):
        raise ValueError(
            f"accelerate was launched with gradient_accumulation_steps {accumulation}, this config "
            f"has {config.gradient_accumulation}: set gradient_accumulation here, and leave it out "
            "there"
        )
    if asked("ACCELERATE_USE_FSDP", "false") == "true":
        if asked("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "accelerate was launched for FSDP 1, in which the loss cannot run inside the head: "
                "set fsdp_version: 2 there"
            )
        if asked("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
            raise ValueError(
                "accelerate was launched with fsdp_activation_checkpointing: leave it out there, "
                "and set gradient_checkpointing here"
            )
        if asked("FSDP_IGNORED_MODULES", ""):
            raise ValueError(
                "accelerate was launched with fsdp_ignored_modules, whose gradients no process "
                "would get of the others: leave it out there"
            )
    if asked("ACCELERATE_USE_MEGATRON_LM", "false") == "true":
        raise ValueError("accelerate was launched for Megatron-LM: use DDP, FSDP2 or DeepSpeed")
    if asked("ACCELERATE_USE_PARALLELISM_CONFIG", "false") == "true":
        for name, meaning in SPLITS_OF_A_MODEL.items():
            if asked(name, "1") != "1":
                raise ValueError(
                    f"accelerate was launched with {meaning} parallelism ({name}="
                    f"{environment[name]}), which the loss is not made for: use DDP, FSDP2 or "
                    "DeepSpeed alone"
                )


def tell_deepspeed(plugin: Any, config: TrainConfig) -> None:
    """Put our numbers into DeepSpeed's configuration; `plugin` is accelerate's, which holds it.

    The student is loaded whole, and cut up by ZeRO-3 only when it was compared with the cache.
    Raises ValueError where that configuration says otherwise than ours.
    """
    unset_hf_deepspeed_config()
    theirs = plugin.deepspeed_config
    for key, here in (("scheduler", "optimizer"), ("optimizer", "optimizer")):
        if key in theirs:
            raise ValueError(
                f"DeepSpeed's config has {key!r}: leave it out there, and set {here} here"
            )
    for precision in ("fp16", "bf16"):
        enabled = theirs.get(precision, {}).get("enabled", "auto")
        if enabled is True and config.mixed_precision != precision:
            raise ValueError(
                f"DeepSpeed's config has {precision} enabled, this config mixed_precision "
                f"{config.mixed_precision}: leave it out there, or auto"
            )
    if (size := theirs.get("tensor_parallel", {}).get("autotp_size", 0)) > 1:
        raise ValueError(
            f"DeepSpeed's config has tensor_parallel.autotp_size {size}, which the loss is not "
            "made for: leave it out there"
        )
    for key, name, value in (
        ("batch_size", "train_micro_batch_size_per_gpu", config.batch_size),
        ("gradient_accumulation", "gradient_accumulation_steps", config.gradient_accumulation),
        ("optimizer.max_grad_norm", "gradient_clipping", config.optimizer.max_grad_norm),
    ):
        found = plugin.deepspeed_config.get(name, "auto")
        if found not in ("auto", 1, value):  # 1 is what accelerate fills in
            raise ValueError(
                f"DeepSpeed's config has {name} {found}, this config {key} {value}: leave it out "
                "there, or auto"
            )
        plugin.deepspeed_config[name] = value
    if plugin.zero_stage == 3:  # without, there would be no student to save
        zero = plugin.deepspeed_config.setdefault("zero_optimization", {})
        zero["stage3_gather_16bit_weights_on_model_save"] = True

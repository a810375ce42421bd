"""Vision-language DPO beside TRL's trainer: one LLaVA, the same pictures, seed and batches.

    python benchmarks/vision.py                     about 4 minutes of one core
    python benchmarks/vision.py --repeats 1

A LLaVA of 6 M parameters from nothing, a CLIP tower on pictures of 112 x 112 (64 tokens each), drawn at random; batches of
8 pairs, full fine-tuning, a frozen reference. The losses of all steps must agree to 1e-4 nats, or the command exits with 1.
Counted are the steps after the first. Images through the vision tower are counted by a hook, of policy and reference.

Writes `benchmarks/results/vision.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from datetime import date
from statistics import median
from typing import Any

import jobs

SIDES = ("ours", "trl")
STEPS, BATCH = 5, 8
TOLERANCE = 1e-4  # nats of a step's loss: two orders of float32 sums over some 100 tokens differ by 1e-6
SIDE, PATCH = 112, 14
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "triangle")
PLACES = ("in the upper left", "in the upper right", "in the lower left", "in the lower right", "in the middle")
WORDS = [
    *COLOURS,
    *SHAPES,
    *"in the upper lower left right middle a there is I see picture of this what shown it".split(),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    jobs.add_measure(parser)
    jobs.add_arguments(parser)
    options = parser.parse_args()
    if jobs.measured_here(options, measure):
        return 0
    runs = []
    for _ in range(options.repeats):
        for side in SIDES:
            job = {"side": side, "seed": options.seed, "threads": options.threads}
            runs.append({"side": side} | jobs.measured_apart(__file__, side, job, options))
            print(runs[-1], flush=True)
    difference = jobs.largest_difference(runs)
    record = {"date": date.today().isoformat(), "machine": jobs.machine(), "difference": difference, "runs": runs}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "vision.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "vision.md").write_text(as_markdown(record))
    print(as_markdown(record))
    return 0 if difference <= TOLERANCE else 1


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import disable_progress_bars
    from one_run import peak_rss_gb
    from watching import Clock

    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    clock, images = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, folder, clock, images)
        trainer.train()
    counted = (STEPS - 1) * BATCH
    cpu_s, wall_s = clock.cost()
    return {
        "pairs_per_cpu_s": counted / cpu_s,
        "pairs_per_wall_s": counted / wall_s,
        "peak_rss_gb": peak_rss_gb(),
        "images_per_pair": sum(images) / (STEPS * BATCH),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def trainer_of(job: dict[str, Any], folder: str, clock: Any, images: list[int]) -> Any:
    processor = processor_of()
    arguments = {
        **jobs.ON_CPU,
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "max_length": 512,
        "learning_rate": 1e-4,
        "seed": job["seed"],
    }
    models = [model_of(processor.tokenizer), model_of(processor.tokenizer)]
    for model in models:
        model.model.vision_tower.register_forward_hook(lambda tower, args, out: images.append(len(out[0])))
    parts = {
        "model": models[0],
        "ref_model": models[1],  # TRL would load one by name; ours would copy the policy, hooks and all
        "train_dataset": rows(STEPS * BATCH, job["seed"]),
        "processing_class": processor,
        "callbacks": [clock],
    }
    if job["side"] == "trl":
        import trl

        return trl.DPOTrainer(args=trl.DPOConfig(**arguments), **parts)
    import dpo_trainer

    arguments["allow_special_tokens_in_text"] = True  # as TRL reads strings
    return dpo_trainer.DPOTrainer(args=dpo_trainer.DPOConfig(**arguments), **parts)


def processor_of() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<image>", "<unk>"]
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *sorted(set(WORDS)), "?", ".", ":"])}, "<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    pictures = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        pictures, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def model_of(words: Any) -> Any:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, vocab_size=len(words), initializer_range=0.05),
        vision_config=CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=256),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    return LlavaForConditionalGeneration(config).float()


def rows(count: int, seed: int) -> Any:
    from datasets import Dataset
    from PIL import Image, ImageDraw

    draw = random.Random(seed)
    made = []
    for _ in range(count):
        picture = Image.new("RGB", (SIDE, SIDE), "grey")
        named, other = ((draw.choice(COLOURS), draw.choice(SHAPES), draw.choice(PLACES)) for _ in range(2))
        x, y = draw.randrange(SIDE // 2), draw.randrange(SIDE // 2)
        ImageDraw.Draw(picture).rectangle((x, y, x + 40, y + 40), fill=named[0])
        asked = "<image> what is shown in this picture ?" + " I see it ." * draw.randrange(8)
        answers = [
            f" there is a {colour} {shape} {place} ." * draw.randint(1, 4) for colour, shape, place in (named, other)
        ]
        made.append(
            {"prompt": asked, "chosen": answers[0] + "</s>", "rejected": answers[1] + "</s>", "images": [picture]}
        )
    return Dataset.from_list(made)


def as_markdown(record: dict[str, Any]) -> str:
    machine = record["machine"]
    lines = [
        f"{record['date']}, {machine['cpu']} ({machine['cores']} cores), 1 thread, float32; `python benchmarks/vision.py`.",
        f"Losses of {STEPS} steps differ by {record['difference']:.0e} nats at most.",
        "",
        "| | TRL 1.16 | dpo_trainer | |",
        "| --- | --- | --- | --- |",
    ]
    for key, name in {
        "pairs_per_cpu_s": "pairs per CPU second",
        "peak_rss_gb": "peak memory, GB",
        "images_per_pair": "images through the vision towers, per pair",
    }.items():
        ours, trl = (median(run[key] for run in record["runs"] if run["side"] == side) for side in SIDES)
        lines.append(f"| {name} | {trl:.2f} | {ours:.2f} | **{ours / trl:.2f}x** |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

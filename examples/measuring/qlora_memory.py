"""Memory of a model in float32 and in 4 bits, while it is loaded and in a LoRA step, each in a process of its own."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from scrubjay import adapter_report
from scrubjay.examples.measuring.memory import high_water


def four_bits() -> BitsAndBytesConfig:
    """nf4 with double quantization."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def load(model: str, bits: int) -> PreTrainedModel:
    """A causal language model in float32, or its projections in 4 bits."""
    options = {"quantization_config": four_bits()} if bits == 4 else {}
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=True, **options)


def quantize(model: str, folder: str) -> None:
    """Write the model with its projections in 4 bits, so that loading it reads no float32."""
    logging.disable_progress_bar()
    load(model, 4).save_pretrained(folder)


def measure(model: str, length: int) -> dict[str, int]:
    """Bytes of the weights, and of resident memory above what the imports take: highest of loading and of a step.

    Weights are mapped from their file and become resident when they are first read, in the step.
    """
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    before = high_water(reset=True)
    network = load(model, 32)  # or as it was saved
    loaded = high_water()
    adapted = get_peft_model(network, LoraConfig(target_modules="all-linear", r=8)).train()
    report = adapter_report(adapted)
    ids = torch.arange(length, device=network.device)[None] % network.config.vocab_size
    high_water(reset=True)
    adapted(input_ids=ids, labels=ids).loss.backward()
    found = {"weights": report.total("nbytes"), "adapter": report.total("trained_nbytes")}
    return found | {"peak_of_loading": loaded - before, "peak_of_a_step": high_water() - before}


def measured_apart(model: str, length: int) -> dict[str, dict[str, int]]:
    """`measure` of both, each in a new process forked from one that has only imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        pool.submit(quantize, model, folder).result()
        jobs = {name: pool.submit(measure, where, length) for name, where in (("float32", model), ("4 bits", folder))}
        return {name: job.result() for name, job in jobs.items()}

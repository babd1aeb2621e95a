"""Complete prompts with a saved model in a process that cannot import scrubjay.

    python isolated.py MODEL_DIR RESULT_JSON NEW_TOKENS SEED PROMPT [PROMPT ...]

What a stranger with torch and transformers gets from the folder: the code in it, and nothing installed.
"""

import json
import sys
from pathlib import Path


class Absent:
    """A finder that is asked first and lets nobody find scrubjay."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "scrubjay":
            raise ImportError("scrubjay is made absent here")


def main(folder: str, result: str, new_tokens: int, seed: int, prompts: list[str]) -> None:
    """Stream a completion of each prompt to stdout and write all of them to `result`."""
    sys.meta_path.insert(0, Absent())  # before anything else is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it reads config.json, which names code
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    completions = []
    for prompt in prompts:
        set_seed(seed)
        print(f"--- {prompt!r}", flush=True)
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": new_tokens}
        completions.append({"prompt": prompt, "text": stream(model, tokenizer, prompt, **sampling)})
    loaded = {"model_class": type(model).__name__, "module": type(model).__module__}
    Path(result).write_text(json.dumps({**loaded, "completions": completions}))


def stream(model, tokenizer, prompt: str, **options) -> str:
    """Print the prompt and, as it comes, what `model.generate(**options)` adds; return both.

    Most vocabularies keep the space before a word in the word's token, and a space alone hardly ever stood before a
    word in training. So a last space is left to the model, whose first token must then begin with one.
    """
    from transformers import TextStreamer

    spaced = [i for token, i in tokenizer.get_vocab().items() if token.startswith(("Ġ", "▁"))]
    healed = prompt.removesuffix(" ") if spaced else prompt
    inputs = tokenizer(healed or prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs.input_ids.shape[1]
    if length == 0:
        raise ValueError(f"the prompt {prompt!r} has no tokens. Pass some text.")

    def begin_with_space(input_ids, scores):
        if healed in ("", prompt) or input_ids.shape[1] > length:
            return scores
        allowed = scores.new_full(scores.shape, float("-inf"))
        allowed[:, spaced] = scores[:, spaced]
        return allowed

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    ids = model.generate(**inputs, **options, logits_processor=[begin_with_space], streamer=streamer)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])

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
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it reads config.json, which names code
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    completions = []
    for prompt in prompts:
        set_seed(seed)
        # a space belongs to the word after it in this vocabulary: the model writes it, we do not
        inputs = tokenizer(prompt.rstrip(" "), return_tensors="pt").to(model.device)
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        print(f"--- {prompt!r}", flush=True)
        ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            streamer=streamer,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
        )
        completions.append({"prompt": prompt, "text": tokenizer.decode(ids[0], skip_special_tokens=True)})
    loaded = {"model_class": type(model).__name__, "module": type(model).__module__}
    Path(result).write_text(json.dumps({**loaded, "completions": completions}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])

"""What the tests of Recycled Attention share: tiny decoders whose attention is peaked, and an oracle. The oracle runs a
decoder with transformers' own `DynamicCache` and an attention function that keeps lists of columns, sorts them, and
attends densely under the mask that they make: slow, and without a line of the library.
"""

import types
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from scrubjay.modeling.inputs.cache_argument import named

VOCAB = 61
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
BOUND = 1e-10  # of the largest logit, in float64; measured: 5e-15, and 3e-2 or more for one wrong key


class OutOfBoundError(AssertionError):
    """The library does not do what the oracle does."""


def exact_norm(self, x):
    """An RMS norm in the input's own dtype: transformers' rounds to float32 inside."""
    eps = getattr(self, "variance_epsilon", None) or self.eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.weight


def decoder(kind="llama", dtype=torch.float64, heads=4, groups=2, layers=2, seed=0, **changes):
    """A random causal language model of transformers, in eval mode; norms exact in float64."""
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, head_dim=8)
    sizes |= dict(num_attention_heads=heads, num_key_value_heads=groups, initializer_range=0.3, bos_token_id=1)
    sizes |= dict(pad_token_id=0, eos_token_id=2, attn_implementation="sdpa", max_position_embeddings=512)
    if kind in ("mistral", "qwen2", "qwen3"):
        sizes["sliding_window"] = None
    if kind == "qwen2":
        sizes["head_dim"] = sizes["hidden_size"] // heads
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes | changes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(1.6)
            elif name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    for module in model.modules():
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(exact_norm, module)
    return model


def tokens(batch, length, seed=1):
    """(batch, length) random ids, none of which is special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(counts, columns, side="left"):
    """(B, columns) bool with counts[b] real columns in row b. "inner": a hole in the middle."""
    real = torch.zeros(len(counts), columns, dtype=torch.bool)
    for row, count in zip(real, counts, strict=True):
        if side == "left":
            row[columns - count :] = True
        elif side == "right":
            row[:count] = True
        else:
            row[: (count + 1) // 2] = True
            row[columns - count // 2 :] = True
    return real


@torch.no_grad()
def drive(model, ids, pieces, cache, real=None, oracle=None, after=None):
    """Logits (B, T, V) of ids given in pieces of these lengths. real: (B, T) bool. after: called behind each piece."""
    found, start = [], 0
    for piece in pieces:
        stop = start + piece
        more = {}
        if real is not None:
            seen = real[:, :stop]
            positions = (seen.long().cumsum(1) - 1).clamp(min=0)[:, start:]
            more = {"attention_mask": seen.long(), "position_ids": positions}
        if oracle is not None:
            oracle.real = torch.ones(len(ids), stop, dtype=torch.bool) if real is None else seen
        found.append(model(ids[:, start:stop], **named(cache), **more).logits)
        if after is not None:
            after()
        start = stop
    return torch.cat(found, 1)


def gap(got, want, real=None):
    """Largest difference at real columns over the largest value wanted there."""
    if real is not None:
        got, want = got[real], want[real]
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def assert_close(got, want, real=None, bound=BOUND):
    found = gap(got, want, real)
    if not found <= bound:
        raise OutOfBoundError(f"error {found:.1e}, bound {bound:.0e}")


def dense(query, key, value, seen, scaling):
    """(B, T, H, P) of query (B, H, T, P) under seen (B, G, T, n)."""
    repeats = query.shape[1] // key.shape[1]
    key, value, seen = (x.repeat_interleave(repeats, 1) for x in (key, value, seen))
    scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)


class Oracle:
    """Every policy, with lists. kept[layer][b][g]: columns, the next to be evicted first."""

    def __init__(self, model, policy="recycled", budget=6, stride=10**9, schedule="fixed", **settings):
        self.policy, self.budget, self.stride, self.schedule = policy, budget, stride, schedule
        usual = dict(pool_kernel=7, group_reduce="max", keep_recent=1, n_sink=0, evict_first=True, full_output=True)
        usual |= dict(window=32, page=16, rank=10**9)  # a rank that loses nothing
        usual |= dict(qc=5, threshold=0.85, qsim_space="pre", qsim_batch="any", full_layers=(), choosing_layers=None)
        self.__dict__.update(usual | settings)
        if policy == "streaming" and not self.n_sink:
            self.n_sink = 4
        self.kept, self.mass, self.since, self.query, self.reference, self.unturned = {}, {}, {}, {}, {}, {}
        self.means, self.full, self.cosines, self.model = {}, {}, [], model
        self.last, self.held = {}, {}

    @contextmanager
    def running(self):
        """The model attends as this oracle says, and remembers its queries before the rotary encoding."""
        global _current
        _current, stock, hooks = self, self.model.config._attn_implementation, []
        for i, layer in enumerate(self.model.get_decoder().layers):
            attention = layer.self_attn
            last = getattr(attention, "q_norm", attention.q_proj)
            hooks.append(last.register_forward_hook(lambda _, args, out, i=i: self.unturned.update({i: out})))
        self.model.set_attn_implementation("recycled_oracle")
        try:
            yield DynamicCache()
        finally:
            self.model.set_attn_implementation(stock)
            for hook in hooks:
                hook.remove()

    def drive(self, ids, pieces, real=None, after=None):
        """As `drive`, and the logits of the oracle."""
        with self.running() as cache:
            return drive(self.model, ids, pieces, cache, real, self, after)

    def attend(self, module, query, key, value, mask, *, scaling, **_):
        i, (B, H, T, _), (G, n) = module.layer_idx, query.shape, key.shape[1:3]
        if self.choosing_layers is not None:
            self.policy = "lowrank" if i in self.choosing_layers else "recycled"
        first, self.scaling = n == T, scaling
        seen = torch.zeros(B, G, T, n, dtype=torch.bool)
        mean = self.mean(i, query)
        everything = self.decides(i, mean, T, first)
        if first:
            self.kept[i] = [[[] for _ in range(G)] for _ in range(B)]
            self.mass[i] = [[{} for _ in range(G)] for _ in range(B)]
        for b in range(B):
            columns = [c for c in range(n) if self.real[b, c]]
            new = [c for c in columns if c >= n - T]
            if new:
                self.last[i, b] = query[b, :, new[-1] - n + T]
            self.held[i, b] = key[b]
            for g in range(G):
                heads = slice(g * H // G, (g + 1) * H // G)
                self.row(i, b, g, columns, new, query[b, heads], key[b, g], everything, seen[b, g])
        seen[:, :, range(T), range(n - T, n)] |= ~self.real[:, None, n - T :]  # padding sees itself
        if everything:
            self.reference[i] = mean
        self.full.setdefault(i, []).append(everything)
        return dense(query, key, value, seen, scaling), None

    def row(self, i, b, g, columns, new, q, k, everything, seen):
        """Fill `seen` (T, n) for one row and key head, and change what it keeps. q: (R, T, P), k: (n, P)."""
        T, n = seen.shape
        kept = self.kept[i][b][g]
        holds_all = self.policy in ("recycled", "full", "lowrank", "quest")
        if new:
            self.query[i, b, g] = q[:, new[-1] - n + T]
        if T == 1 and not everything and holds_all and self.policy != "recycled":
            seen[0, self.choose_anew(i, b, g, columns, k)] = True
            return
        if T == 1 and not everything:
            if new:
                self.put(i, b, g, columns, n - 1)
            seen[0, kept] = True
            if self.policy == "h2o" and new:
                self.receive(i, b, g, q, k, seen)
            elif self.policy == "tova" and new:
                self.mass[i][b][g] = self.over_heads(i, b, kept)
            return
        past = columns if holds_all else [*kept, *new]
        for t in range(T):
            seen[t, [c for c in past if c <= n - T + t]] = True
        if not new and not holds_all:
            return
        if self.policy == "h2o":
            self.receive(i, b, g, q[:, [c - n + T for c in new]], k, seen[[c - n + T for c in new]])
        if self.policy == "snapkv":
            at = [c - n + T for c in new]
            kept[:] = [*kept, *new] if kept else self.watched(columns, q[:, at], k)
            return
        if self.policy == "tova":
            self.mass[i][b][g] = self.over_heads(i, b, sorted(past))
        kept[:] = self.choose(i, b, g, sorted(past), columns, self.query[i, b, g], k)
        if T == 1 and not self.full_output and self.policy == "recycled" and i not in self.full_layers:
            seen[:] = False
            seen[0, kept] = True

    def put(self, i, b, g, columns, column):
        """Evict one if there is no room, and keep the new column."""
        kept = self.kept[i][b][g]
        if len(kept) == self.budget + (not self.evict_first) and self.policy != "snapkv":
            spared = set(columns[: self.n_sink])
            if self.policy == "h2o":
                spared |= set(columns[-(self.budget // 2) :]) if self.budget > 1 else set()
            elif self.policy == "tova":
                spared |= set(columns[-self.keep_recent :])
            if self.policy in ("h2o", "tova"):
                mass = self.mass[i][b][g]
                kept.sort(key=lambda c: mass[c])
            kept.remove(next(c for c in kept if c not in spared))
        kept.append(column)
        self.mass[i][b][g].setdefault(column, 0.0)

    def receive(self, i, b, g, q, k, seen):
        """Add what each column received from q (R, T, P): the largest probability among the heads."""
        mass = self.mass[i][b][g]
        p = (q @ k.T * self.scaling).masked_fill(~seen, -torch.inf).softmax(-1).amax(0).sum(0)
        for column in range(len(k)):
            mass[column] = mass.get(column, 0.0) + float(p[column])

    def choose(self, i, b, g, held, columns, q, k):
        """The budget's worth of `held`, ascending. q: (R, P)."""
        if self.policy == "streaming":
            score = {c: float(c) for c in held}
        elif self.policy in ("h2o", "tova"):
            score = self.mass[i][b][g]
        else:
            p = (q @ k[held].T * self.scaling).double().log_softmax(-1)
            u = {"max": p.amax(0), "mean": p.logsumexp(0), "first": p[0]}[self.group_reduce].tolist()
            score = self.pooled(held, u, 1 if self.policy == "lowrank" else self.pool_kernel)
        return self.best(held, columns, score, self.budget // 2 if self.policy == "h2o" else self.keep_recent)

    @staticmethod
    def pooled(held, u, kernel):
        """{column: the largest of neighbouring scores}."""
        half = kernel // 2
        return {c: max(u[max(0, at - half) : at + half + 1]) for at, c in enumerate(held)}

    def best(self, held, columns, score, recent):
        """The budget's worth of `held` by {column: score}, ascending, the newest and the sinks among them."""
        sinks = [c for c in columns[: self.n_sink] if c in held]
        recent = [c for c in held[len(held) - recent :] if c not in sinks] if recent else []
        others = sorted((c for c in held if c not in sinks and c not in recent), key=lambda c: (score[c], c))
        room = self.budget - len(sinks) - len(recent)
        return (others[-room:] if room > 0 else []) + recent + sinks

    def choose_anew(self, i, b, g, columns, k):
        """What a step of "lowrank" or "quest" attends; columns: all tokens so far. k: (n, P)."""
        n, q = len(k), self.query[i, b, g]
        if n <= self.budget:
            return columns
        if self.policy == "lowrank":
            return self.choose(i, b, g, columns, columns, q, k)
        bounds, whole = {}, n // self.page
        for page in range(whole):
            if inside := [c for c in range(page * self.page, (page + 1) * self.page) if c in columns]:
                low, high = k[inside].amin(0), k[inside].amax(0)
                bounds[page] = float(torch.maximum(q * low, q * high).sum(1).max())
        room = max((self.budget - n % self.page) // self.page, 1)
        best = sorted(bounds, key=bounds.get)[-room:]
        return [c for c in columns if c // self.page in best or c >= whole * self.page]

    def watched(self, columns, q, k):
        """SnapKV's choice among a prompt's tokens, whose queries are q (R, T, P)."""
        window = max(self.keep_recent, min(self.window, self.budget // 2))
        total = torch.zeros(len(columns), dtype=q.dtype)
        for at in range(max(0, len(columns) - window), len(columns)):
            p = (q[:, at] @ k[columns[: at + 1]].T * self.scaling).softmax(-1)
            total[: at + 1] += p.amax(0)
        return self.best(columns, columns, self.pooled(columns, total.tolist(), self.pool_kernel), window)

    def over_heads(self, i, b, held):
        """{column: its probability for the last query, the mean over all heads} (TOVA)."""
        q, keys = self.last[i, b], self.held[i, b]
        scores = torch.stack([q[h] @ keys[h * len(keys) // len(q)][held].T for h in range(len(q))]) * self.scaling
        return dict(zip(held, scores.softmax(-1).mean(0).tolist(), strict=True))

    def decides(self, i, mean, T, first):
        """Whether all keys are attended in this call of T columns, which is the `first` of its text."""
        if first or T > 1 or self.policy not in ("recycled", "full"):
            self.since[i] = 0
            return first or T > 1 or (self.policy in ("lowrank", "quest") and i in self.full_layers)
        if self.policy == "full" or i in self.full_layers:
            return True
        self.since[i] += 1
        if self.schedule == "fixed":
            return self.since[i] % self.stride == 0
        if self.since[i] % self.qc:
            return False
        alike = F.cosine_similarity(mean, self.reference[i], dim=-1)
        self.cosines.append((i, *alike.tolist()))
        apart = alike <= self.threshold
        return bool(apart.any() if self.qsim_batch == "any" else apart.all())

    def mean(self, i, query):
        """(B, P): of the query heads, before or after the rotary encoding, at the last token of each row so far."""
        B, H, T, _ = query.shape
        each = query.transpose(1, 2)
        if self.qsim_space == "pre":
            each = self.unturned[i].reshape(B, T, H, -1)
        for b in range(B):
            if at := [t for t in range(T) if self.real[b, t - T]]:
                self.means[i, b] = each[b, at[-1]].mean(0)
        return torch.stack([self.means.get((i, b), each[b, -1].mean(0)) for b in range(B)])


_current: Oracle | None = None


def _attend(*args, **kwargs):
    return _current.attend(*args, **kwargs)


AttentionInterface.register("recycled_oracle", _attend)
AttentionMaskInterface.register("recycled_oracle", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def compare(model, ids, pieces, cache, oracle, real=None, bound=BOUND, after=None):
    """The library's logits are the oracle's."""
    want = oracle.drive(ids, pieces, real)
    assert_close(drive(model, ids, pieces, cache, real, after=after), want, real, bound)

"""Makes the demo model: a few million parameters that small-talk, do small sums and explain Baton, trained from nothing in minutes.

    python examples/train_demo.py --out examples/demo-model --minutes 20

Conversations are put together here from the pieces in `demo_text.toml`; nothing is downloaded. Needs torch, transformers and tokenizers.
What comes out is an ordinary Hugging Face Llama folder. The model knows nothing beyond that text, and says so.

Twenty minutes of one CPU core give good answers and poor sums (47 of 100 right below 10). `examples/demo-model` saw 90 million tokens in
five minutes of one GPU: `--minutes 5 --batch-tokens 24576 --workers 13 --lr 8e-3 --autocast` (100 of 100 right up to 20, 90 up to 99).
"""

import argparse
import random
import re
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
PAD, BOS, START, END = range(4)
IDLE_WORDS = frozenset(["the", "a", "an", "is", "are", "does", "do", "to", "me", "of", "in", "can", "you", "what", "how", "please", "tell"])
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
COUNT_TO = ("to", "to", "until", "from 1 to", "from one to")
MAX_POSITIONS = 4096

Turn = tuple[str, str]
"""A question and its answer."""


class Writer:
    """Writes conversations. Everything is drawn from one random generator, so a seed fixes the text."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.text: dict[str, Any] = tomllib.loads(Path(__file__).with_name("demo_text.toml").read_text())
        for about in self.text["subject"]:
            about["answer"] = about["answer"].splitlines()

    def pick(self, name: str) -> str:
        return self.rng.choice(self.text[name])

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def phrase(self, question: str) -> str:
        """The question as some user might type it: with or without greeting, capital, mark, politeness; now and then with a slip."""
        rng = self.rng
        if self.chance(0.2):
            question = self.pick("openers") + question
        if self.chance(0.12):
            question += self.pick("closers")
        words = question.split()
        if self.chance(0.1) and (idle := [at for at, word in enumerate(words) if word in IDLE_WORDS]) and len(words) > 3:
            del words[rng.choice(idle)]
        if self.chance(0.1) and (long := [at for at, word in enumerate(words) if word.isalpha() and len(word) > 4]):
            at = rng.choice(long)
            cut = rng.randrange(1, len(words[at]) - 1)
            slips = (words[at][cut + 1 :], words[at][cut] + words[at][cut:], words[at][cut + 1] + words[at][cut] + words[at][cut + 2 :])
            words[at] = words[at][:cut] + rng.choice(slips)
        question = " ".join(words)
        if self.chance(0.7):
            question = question[0].upper() + question[1:]
        elif self.chance(0.3):
            question = question.lower()
        return question + (rng.choice(("?", "?", "?", "", "", ".", "!")) if question[-1].isalnum() else "")

    def subject(self, about: dict[str, Any], follow_up: bool = False) -> Turn:
        rng = self.rng
        if self.chance(0.45) and not follow_up:
            question = rng.choice(about["ask"])
        else:
            name = rng.choice(about["names"])
            name = re.sub("^(the|a) ", "", name) if self.chance(0.35) else name
            question = self.pick("ask_on" if follow_up else "ask").format(name)
        length = rng.random()
        if length < 0.2:
            return self.phrase(self.pick("brief").format(question)), about["answer"][0]
        if length < 0.45:
            return self.phrase(self.pick("detailed").format(question)), " ".join(about["answer"])
        return self.phrase(question), " ".join(about["answer"][:3])

    def arithmetic(self) -> Turn:
        rng = self.rng
        sign = rng.choice("++--*")
        top = rng.choice((5, 10, 12) if sign == "*" else (9, 9, 12, 20, 50, 99))
        a, b = rng.randint(0, top), rng.randint(0, top)
        if sign == "-" and a < b and self.chance(0.7):
            a, b = b, a
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        names = NUMBERS if max(a, b) <= 12 and self.chance(0.15) else list(map(str, range(100)))
        return self.phrase(rng.choice(self.text["sums"][sign]).format(a=names[a], b=names[b])), f"{a} {sign} {b} = {result}."

    def small(self) -> Turn:
        about = self.rng.choice(self.text["talk"])
        return self.phrase(self.rng.choice(about["ask"])), self.rng.choice(about["answer"])

    def unknown(self) -> Turn:
        thing = self.pick("things") if self.chance(0.6) else self.pick("objects") if self.chance(0.6) else self.nonsense()
        return self.phrase(self.pick("unknown_ask").format(thing)), self.text["unknown"]

    def nonsense(self) -> str:
        """A word that nobody has heard of."""
        return "".join(self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(self.rng.randint(2, 4)))

    def count(self) -> Turn:
        first = self.rng.choice((1, 1, self.rng.randint(0, 20)))
        last = first + self.rng.randint(2, 19)
        question = f"count {self.rng.choice(COUNT_TO)} {last}" if first == 1 else f"count from {first} to {last}"
        return self.phrase(question), ", ".join(map(str, range(first, last + 1))) + "."

    def story(self) -> Turn:
        at = self.rng.randrange(len(self.text["heroes"]))
        hero, name, place, dream = (self.text[key][at % len(self.text[key])] for key in ("heroes", "names", "places", "dreams"))
        story = " ".join(self.text["story"].format(a=hero, n=name, p=place, d=dream).splitlines())
        return self.phrase(self.pick("story_ask").format(hero)), story

    def rules(self, sentences: int) -> str:
        """Text for system prompts, most of it beside the point: the model has to learn to look past it."""

        def fill(match: re.Match[str]) -> str:
            if match[1] == "i":
                return str(self.rng.randint(1, 99))
            if match[1] == "o" and self.chance(0.2):
                return self.nonsense()
            return self.pick({"o": "objects", "w": "days", "n": "names"}[match[1]])

        known = [sentence for about in self.rng.sample(self.text["subject"], 3) for sentence in about["answer"]]
        parts = [self.rng.choice(known) if self.chance(0.15) else self.pick("rules") for _ in range(sentences)]
        return re.sub(r"\{(.)\}", fill, (" " if self.chance(0.7) else "\n").join(parts))

    def conversation(self) -> list[dict[str, str]]:
        """Messages of one conversation: perhaps a system prompt, then one to eight turns."""
        rng, name, last, messages = self.rng, "", None, []
        if self.chance(0.4):
            messages.append(
                {"role": "system", "content": self.rules(int(10 * 12 ** rng.random()) if self.chance(0.25) else rng.randint(1, 4))}
            )
        for _ in range(rng.choices(range(1, 9), (40, 20, 14, 10, 7, 4, 3, 2))[0]):
            rest, kind = last["answer"][3:] if last else [], rng.random()
            if rest and kind < 0.3:
                question, answer, last = self.phrase(self.pick("more")), " ".join(rest), None
            elif kind < 0.45:
                about, last = rng.choice(self.text["subject"]), None
                question, answer = self.subject(about, follow_up=bool(messages) and self.chance(0.25))
                last = about if answer == " ".join(about["answer"][:3]) else None
            elif kind < (0.6 if name else 0.5):
                asked = self.chance(0.8 if name else 0.3)
                name = name if asked else self.pick("names") if self.chance(0.7) else self.nonsense().capitalize()
                question = self.phrase(self.pick("who_am_i" if asked else "i_am").format(name))
                answer = (f"Your name is {name}." if name else "You have not told me your name.") if asked else f"Nice to meet you, {name}!"
            else:
                make = rng.choices((self.arithmetic, self.small, self.unknown, self.count, self.story), (50, 30, 12, 5, 4))[0]
                (question, answer), last = make(), None
            if self.chance(0.02):
                question = f"{self.rules(rng.randint(2, 20))}\n\n{question}"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages


def make_tokenizer(writer: Writer, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any UTF-8 text round-trips. Digits stay single, which makes sums learnable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((message["content"] for _ in range(20_000) for message in writer.conversation()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)])
    names = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, model_max_length=4096, clean_up_tokenization_spaces=False)
    made.chat_template = CHAT_TEMPLATE
    return made


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], list[float]]:
    """Token ids as the chat template gives them, and each token's weight in the loss: 1 in answers, little elsewhere."""
    ids, weights = [BOS], [0.0]
    texts = [text for message in messages for text in (message["role"] + "\n", message["content"])]
    parts = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast([*texts, "\n"], add_special_tokens=False)]
    for at, message in enumerate(messages):
        head, body = parts[2 * at : 2 * at + 2]
        ids += [START, *head, *body, END, *parts[-1]]
        loud = 1.0 if message["role"] == "assistant" else 0.05
        weights += [0.02] * (1 + len(head)) + [loud] * (len(body) + 1) + [0.02] * len(parts[-1])
    return ids, weights


class Batches(IterableDataset[tuple[torch.Tensor, ...]]):
    """Endless (ids, loss weights, positions), each [rows, length] with about `tokens` entries; rows of a batch have similar lengths."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int) -> None:
        self.tokenizer, self.seed, self.tokens = tokenizer, seed, tokens

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker = get_worker_info()
        writer = Writer(self.seed + (worker.id if worker else 0))
        while True:
            rows = [encode(self.tokenizer, writer.conversation()) for _ in range(max(256, self.tokens // 16))]
            rows = sorted((row for row in rows if len(row[0]) <= min(2048, self.tokens)), key=lambda row: len(row[0]))
            cut: list[list[tuple[list[int], list[float]]]] = [[]]
            for row in rows:
                if len(row[0]) * (len(cut[-1]) + 1) > self.tokens:
                    cut.append([])
                cut[-1].append(row)
            writer.rng.shuffle(cut)
            yield from map(self.tensors, cut)

    def tensors(self, rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, ...]:
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in rows])
        weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
        # Gaps between turns stand for long texts: the model meets distances up to its whole context without paying for them.
        gaps = (ids == START) * (torch.rand(ids.shape) < 0.3) * torch.randint(0, 900, ids.shape) * (torch.rand(len(rows), 1) < 0.3)
        return ids, weights, (torch.arange(length) + gaps.cumsum(1)).clamp(max=MAX_POSITIONS - 1)


def train(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """Matrices learn by Muon, the rest by AdamW; the learning rate follows the clock, so that training ends in time on any machine."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD, initializer_range=0.07,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device).train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}, on {device}", flush=True)
    data = Batches(tokenizer, args.seed, args.batch_tokens)
    start = reported = time.monotonic()
    seen, running = 0, 0.0
    for step, (ids, weights, positions) in enumerate(DataLoader(data, batch_size=None, num_workers=args.workers)):
        progress = (time.monotonic() - start) / (60 * args.minutes)
        if progress >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * min(1.0, (step + 1) / 30, 1.4 * (1 - progress) + 0.01)
        ids, weights, positions = ids.to(device), weights.to(device)[:, 1:].flatten(), positions.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=args.autocast):
            # The mask says that jumps in the positions do not begin a new sequence.
            logits = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
        picked = weights > 0
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1)[picked].float(), ids[:, 1:].flatten()[picked], reduction="none"
        )
        loss = (losses * weights[picked]).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += ids.numel()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (now := time.monotonic()) - reported > 15:
            print(f"{now - start:5.0f} s  step {step:5d}  {seen:>10,} tokens  loss {running:.3f}", flush=True)
            reported = now
    return model.cpu().eval()


# Few of these are among the templates.
HELD = """
Hello there, how lovely to see you | Could you tell me who you are exactly? | know any good jokes? | thx a lot | ttft?
What is 3 plus 4? | what's 12 - 5 | If I have 7 coins and find 6, how many coins do I have?
sum 23 and 14 | 8 by 7 = ? | Which part of Baton writes the reply tokens?
Why should I care about prefix caching? | my decode worker just crashed, what now? | List all policies of the router | Is etcd necessary?
I saw x-baton-route in the response, what is that? | Which tool moves KV blocks over the network? | What does a router do all day?
Can I start Baton without a graphics card? | Explain step by step how a request travels through Baton | Describe Baton in a single sentence
Please tell me a long story about the relay race | Story about a dragon please | chunked prefill, long answer | count up to 15 | cya
Suppose the pool has lost a block. Is the answer wrong? | Who is the king of Norway? | What should I cook for dinner? | ok, I see now
"""


def reply(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[str, int, bool]:
    """(greedy answer, tokens of the prompt, whether the answer ended by itself)."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=300, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True), prompt["input_ids"].shape[1], int(out[-1]) == END


def examine(folder: Path, seed: int) -> None:
    """Loads the folder as any user would, and prints answers and the share of right sums."""
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder).eval()
    writer = Writer(seed + 1000)
    for _ in range(200):
        messages = writer.conversation()
        assert encode(tokenizer, messages)[0] == tokenizer.apply_chat_template(messages, return_dict=False), messages
    for text in ("naïve café ☕ 漢字 🏃", " a  b\n\n\tc "):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text, text
    long_prompt = {"role": "system", "content": writer.rules(45)}
    for system in ([], [long_prompt]):
        for question in (question for line in HELD.strip().splitlines() for question in line.split(" | ")):
            answer, length, ended = reply(model, tokenizer, [*system, {"role": "user", "content": question}])
            print(f"[{length:4d}]{'' if ended else ' NO END'} {question}\n        → {answer}", flush=True)
    for system in ([], [long_prompt]):
        messages = list(system)
        for question in (
            "Hi, my name is Lena",
            "What is the router?",
            "tell me more",
            "and decode?",
            "7 + 8",
            "What is my name?",
            "Thanks!",
        ):
            messages.append({"role": "user", "content": question})
            answer, length, _ = reply(model, tokenizer, messages)
            messages.append({"role": "assistant", "content": answer})
            print(f"[{length:4d}] {question}\n        → {answer}", flush=True)
    for top in (9, 20, 50, 99):
        right = 0
        for _ in range(100):
            a, b, sign = writer.rng.randint(0, top), writer.rng.randint(0, top), writer.rng.choice("+-" if top > 9 else "+-*")
            a, b = max(a, b), min(a, b)
            answer = reply(model, tokenizer, [{"role": "user", "content": f"What is {a} {sign} {b}?"}])[0]
            right += answer == f"{a} {sign} {b} = {a + b if sign == '+' else a - b if sign == '-' else a * b}."
        print(f"sums up to {top}: {right} of 100 right", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per training step; take 32768 or more on a GPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that write text; take some on a GPU")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--autocast", action="store_true", help="multiply in bfloat16: faster on GPUs and on CPUs that have it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("train", "examine"), help="one half of the work; examining prints answers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only != "examine":
        tokenizer = make_tokenizer(Writer(args.seed), args.vocab_size)
        model = train(tokenizer, args).to(torch.bfloat16)
        model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD)
        model.save_pretrained(args.out)
        model.config.dtype = "float32"  # stored in half the space, computed in full
        model.config.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out, save_jinja_files=False)
        settings = args.out / "tokenizer_config.json"  # the class by the name that transformers 4 knows too
        settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    if args.only != "train":
        examine(args.out, args.seed)


if __name__ == "__main__":
    main()

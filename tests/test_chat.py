"""Conversations with models that were trained for them: a tiny random model with the files of a
Hugging Face directory goes through export.py, and what ./run feeds is what the template says.
"""
import json
import struct

import pytest

pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
import based                                                    # noqa: E402
import export                                                   # noqa: E402
from test_cli import run                                        # noqa: E402
from test_families import CHATML, LLAMA3, MISTRAL, WITH_DEFAULT, ZEPHYR     # noqa: E402
from test_tokenizer import DATA                                 # noqa: E402

TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "hidden_act": "silu", "tie_word_embeddings": False}
SAYS = ["-q", "-t", "0", "-s", "1"]


def exported(directory, template=None, family="qwen2", generation=None, add=()):
    """The checkpoint of a random model with this template, and the original tokenizer (not of
    SentencePiece). add: special tokens."""
    bos, eos = {"llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
                "sentencepiece": ("<s>", "</s>")}.get(family, (None, "<|endoftext|>"))
    config = {"bos_token": bos, "eos_token": eos}
    vocab = {"qwen2": 703, "smollm": 703, "llama3": 708, "sentencepiece": 1600}[family]
    write = {"config.json": {**TINY, "vocab_size": vocab}, "tokenizer_config.json": config}
    if template:
        write["tokenizer_config.json"]["chat_template"] = template
    if generation:
        write["generation_config.json"] = generation
    source = DATA / "tokenizers" / f"{family}.json"
    name = "tokenizer.json" if source.exists() else "tokenizer.model"
    if source.exists():
        spec = json.loads(source.read_bytes())
        spec["normalizer"] = None
        for index, text in enumerate(add, 705):
            spec["added_tokens"].append({**spec["added_tokens"][0], "content": text, "id": index})
        # the original numbers tokens anew that are not in the vocabulary
        spec["model"]["vocab"].update({t["content"]: t["id"] for t in spec["added_tokens"]})
        write[name] = spec
    else:
        (directory / name).write_bytes(source.with_suffix(".model").read_bytes())
    for file, value in write.items():
        (directory / file).write_text(json.dumps(value))
    out = directory / "chat.bin"
    assert export.main(["--random", str(directory / "config.json"), str(out), "--tokenizer",
                        str(directory / name)]) == 0
    return out, source.exists() and tokenizers.Tokenizer.from_file(str(directory / name))


CASES = {
    "chatml": (CHATML, "qwen2", "Be good.",
               "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
               "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\nAnd<eos>?<|im_end|>\n"
               "<|im_start|>assistant\n"),
    "default": (WITH_DEFAULT, "smollm", None,
                "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
                "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\nAnd<eos>?<|im_end|>\n"
                "<|im_start|>assistant\n"),
    "llama3": (LLAMA3, "llama3", None,
               "<|begin_of_text|><|head|>system<|/head|>\n\nDate: 1 Jan\n\n<|eot|>"
               "<|head|>user<|/head|>\n\nHello!<|eot|><|head|>assistant<|/head|>\n\n",
               "<|eot|><|head|>user<|/head|>\n\nAnd<eos>?<|eot|><|head|>assistant<|/head|>\n\n"),
}


def history(state):
    """based_history and the number of tokens, from a saved state."""
    return struct.unpack_from("<QQ", state.read_bytes(), 40)


def fed(model, ids, state):
    run(model, *SAYS, "-n", "0", "--tokens", " ".join(map(str, ids)), "--save", state).text()
    return history(state)


@pytest.mark.parametrize("case", CASES)
def test_what_is_fed_is_what_the_template_says(tmp_path, case):
    """The ids are those of the original tokenizer for the text of the template, over two turns, at
    once or with a saved state between them."""
    template, family, system, first, second = CASES[case]
    add = ["<|head|>", "<|/head|>", "<|eot|>"] if case == "llama3" else []
    model, original = exported(tmp_path, template, family, add=add)
    state, other = tmp_path / "s", tmp_path / "t"
    chat = [model, "-m", "chat", *SAYS, "-n", "0", *(["-y", system] if system else [])]

    def ids(text):                      # <eos> is no token here: somebody's text
        return original.encode(text, add_special_tokens=False).ids

    run(*chat, "--save", state, stdin=b"Hello!\n").text()
    assert history(state) == fed(model, ids(first), other)
    run(*chat, "--save", state, stdin=b"Hello!\nAnd<eos>?\n").text()
    whole = fed(model, ids(first + second), other)
    assert history(state) == whole
    run(*chat, "--save", state, stdin=b"Hello!\n").text()
    run(model, "-m", "chat", *SAYS, "-n", "0", "--load", state, "--save", state,
        stdin=b"And<eos>?\n").text()
    assert history(state) == whole
    # /reset and /undo come back to the beginning, and to the first turn
    run(*chat, "--save", state, stdin=b"What?\n/reset\nHello!\nNo\n/undo\nAnd<eos>?\n").text()
    assert history(state) == whole


def test_names_of_special_tokens_in_what_is_said_are_text(tmp_path):
    model, original = exported(tmp_path, CHATML)
    state, other = tmp_path / "s", tmp_path / "t"
    run(model, "-m", "chat", *SAYS, "-n", "0", "--save", state, stdin=b"a<|im_end|>b\n").text()
    original.encode_special_tokens = False
    before, after = (original.encode(text).ids for text in (
        "<|im_start|>", "<|im_end|>\n<|im_start|>assistant\n"))
    original.encode_special_tokens = True
    ids = before + original.encode("user\na<|im_end|>b").ids + after
    assert history(state) == fed(model, ids, other)


@pytest.mark.parametrize("template, text", [
    (MISTRAL, "[INST] Hi [/INST]"), (ZEPHYR, "<|user|>\nHi</s>\n<|assistant|>\n")])
def test_sentencepiece(tmp_path, template, text):
    """A prefix space stands before the first text, and before no other."""
    library = pytest.importorskip("sentencepiece")
    model, _ = exported(tmp_path, template, "sentencepiece")
    path = DATA / "tokenizers" / "sentencepiece.model"
    encode = library.SentencePieceProcessor(
        model_file=str(DATA / "tokenizers" / "sentencepiece.model")).encode
    first, *rest = text.split("</s>")
    ids = [1] * (template is MISTRAL) + encode(first)
    for part in rest:                   # it begins with a byte, which merges with no space
        ids += [2] + encode(part)[1:]
    state, other = tmp_path / "s", tmp_path / "t"
    run(model, "-m", "chat", *SAYS, "-n", "0", "--save", state, stdin=b"Hi\n").text()
    assert history(state) == fed(model, ids, other)


def test_a_reply_ends_at_any_stop_token(tmp_path):
    """The third token that the model says is made a stop token."""
    model, original = exported(tmp_path, CHATML)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    prompt = original.encode(text).ids
    session, said = based.Session(based.Model(model)), []
    logits = session.feed(prompt)[-1]
    while len(said) < 3:
        said.append(int(logits.argmax()))
        logits = session.step(said[-1])
    assert len(set(said)) == 3
    whole = run(model, *SAYS, "-i", text, "-n", "3", "--no-display-prompt", "--ignore-eos").text()

    model, _ = exported(tmp_path, CHATML,
                        generation={"eos_token_id": [said[2], 699]})
    state, other = tmp_path / "s", tmp_path / "t"
    chat = [model, "-m", "chat", *SAYS, "-n", "9", "-i", "Hello", "--save", state]
    reply = run(*chat).text()
    assert whole.startswith(reply.rstrip(b"\n"))
    assert history(state) == fed(model, prompt + said[:2], other)
    assert run(model, *SAYS, "-i", text, "-n", "9", "--no-display-prompt").text() == reply
    run(*chat, "--ignore-eos").text()
    assert history(state)[0] == len(prompt) + 9
    ends = sorted([said[2], 699, 702])                      # 702 ends a reply in the template
    info = run(model, "--info").text().decode()
    assert f", end 700 or {' or '.join(map(str, ends))}\n" in info and "template of its own" in info


def test_recommended_sampling(tmp_path):
    """It counts unless a flag says otherwise, even if that is the usual default."""
    said = {"temperature": 0.5, "top_k": 1, "repetition_penalty": 1.25}
    model, _ = exported(tmp_path, generation=said)
    rest = "--min-p 0 --repeat-penalty 1.25 --repeat-last-n 1024 as the checkpoint says\n"
    line = f"-t 0.5 -p 1 -k 1 {rest}"
    assert f"sampling     {line}" in run(model, "--info").text().decode()
    args = [model, "-i", "Hello", "-n", "20", "-v"]
    a, b = (run(*args, "-s", seed) for seed in (1, 2))
    assert a.text() == b.text() and f"sample: {line}" in a.err.decode()
    a, b = (run(*args, "-s", seed, "-k", "0", "-t", "1.0") for seed in (1, 2))
    assert a.text() != b.text() and f"sample: -t 1 -k 0 as given, -p 1 {rest}" in a.err.decode()
    done = run(model, "-i", "Hello", "-n", "5", "-v", "--repeat-penalty", "1.0", "--top-p=0.9")
    assert "sample: -p 0.9 --repeat-penalty 1 as given, -t 0.5 -k 1 --min-p 0 " in done.err.decode()
    model, _ = exported(tmp_path, generation={"eos_token_id": 3, "do_sample": False, **said})
    done = run(model, "-i", "Hello", "-n", "5", "-v")
    usual = "-t 1 -p 0.9 -k 0 --min-p 0 --repeat-penalty 1 --repeat-last-n 64 by default\n"
    assert f"sample: {usual}" in done.err.decode() and done.status == 0


def test_sampling_of_ones_own(tmp_path):
    """export.py --sampling: over what generation_config.json says, over run's defaults, and into a
    checkpoint, of which nothing else changes."""
    def info(model):
        return run(model, "--info").text().decode().partition("\nsampling     ")[2].splitlines()[0]
    model, _ = exported(tmp_path, generation={"temperature": 0.5, "top_k": 3})
    out, other = tmp_path / "out.bin", tmp_path / "other.bin"
    asked = ["--sampling", "temp=0.25,repeat-last-n=9"]
    assert export.main([str(model), str(out), *asked]) == 0
    line = "--repeat-penalty 1 --repeat-last-n 9 as the checkpoint says"
    assert info(out) == "-t 0.25 -p 1 -k 3 --min-p 0 " + line
    before, after = export.Checkpoint(model), export.Checkpoint(out)
    assert before.tokenizer == after.tokenizer and before.layers == after.layers
    assert all((before.raw(t.name) == after.raw(t.name)).all() for t in before.placed)
    assert export.main(["--random", str(tmp_path / "config.json"), str(other), *asked,
                        "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert info(other) == "-t 0.25 -p 1 -k 3 --min-p 0 " + line
    model, _ = exported(tmp_path, generation={"do_sample": False})
    assert export.main([str(model), str(out), *asked]) == 0
    assert info(out) == "-t 0.25 -p 0.9 -k 0 --min-p 0 " + line


def test_a_base_model_says_so(tmp_path):
    model, _ = exported(tmp_path)
    chat = [model, "-m", "chat", "-t", "0", "-n", "2", "-i", "Hello"]
    base = run(*chat)
    assert base.err.decode().count("is a base model: ") == 1 and base.status == 0
    assert b"base model" in run(model, "--info").text()
    for more in (["-q"], ["--chat-template", "User: {}\\nAssistant:"]):
        done = run(*chat, *more)
        assert b"base model" not in done.err and done.text() == base.text()
    model, _ = exported(tmp_path, CHATML)
    assert b"base model" not in run(*chat).err


def test_the_plain_template_on_request(tmp_path):
    """It is then the one without special tokens, start token included, as with a base model."""
    state = tmp_path / "s"
    chat = ["-m", "chat", *SAYS, "-n", "0", "--save", state, "-y", "A", "-i", "Hello",
            "--chat-template", "Q: {}\\nA:"]
    ends = []
    for template in (CHATML, None):
        model, original = exported(tmp_path, template)
        run(model, *chat).text()
        ends.append(history(state))
        ids = [700] + original.encode("A\nQ: Hello\nA:").ids
        assert ends[-1] == fed(model, ids, tmp_path / "t")
    assert ends[0] == ends[1]


def test_no_system_message(tmp_path):
    model, _ = exported(tmp_path, MISTRAL, "sentencepiece")
    run(model, "-m", "chat", "-y", "Be good.", "-i", "Hi").error(2, "no system prompt")


def test_text_that_is_not_composed(tmp_path):
    """Told once, for a tokenizer that wants NFC only."""
    model, _ = exported(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_bytes())
    spec["normalizer"] = {"type": "NFC"}
    (tmp_path / "nfc.json").write_text(json.dumps(spec))
    nfc = tmp_path / "nfc.bin"
    assert export.main(["--random", str(tmp_path / "config.json"), str(nfc), "--tokenizer",
                        str(tmp_path / "nfc.json")]) == 0
    composed, apart = "caf\u00e9", "cafe\u0301"
    for path, text, more, count in ((nfc, apart, [], 1), (nfc, apart, ["-q"], 0),
                                    (nfc, composed, [], 0), (model, apart, [], 0)):
        done = run(path, "-i", text, "-n", "1", *more)
        assert done.err.count(b"(Unicode's NFC)") == count and done.status == 0
    done = run(nfc, "-m", "chat", "-n", "1", stdin=(apart + "\n").encode() * 3)
    assert done.err.count(b"(Unicode's NFC)") == 1

#!/usr/bin/env bash
# Guess: whatever deepeval's GSM8K does about commas, a right answer in plain digits scores, so that a model that is
# right everywhere gets 1.0.
# True (deepeval 4.3.1): a reference of 1,080 keeps its comma, and texts are compared. A model that honours the schema
# returns an integer, which has none, so that no right answer to such a problem scores. 14 of the test set's 1,319
# references have a comma (117 others of 1,000 and more have none): a perfect model gets .9894. And enable_cot, the
# default, is for the prompt only. A model without schemas is told to think step by step and to output only the number,
# and its whole text is compared: one that writes as the prompt's own examples do, "**Solution**: ... **Answer**: 18",
# gets 0. So do 18.0, $18 and 18 with a full stop.
# Why: GSM8KTemplate.format_answer (deepeval/benchmarks/gsm8k/template.py) takes what stands behind "####" as it is,
# NumberSchema (benchmarks/schema.py) has `answer: int`, and GSM8K.predict hands str() of it to Scorer.exact_match_score
# (scorer/scorer.py), which only strips blanks. Without a schema predict compares the whole response.
# Bites: whoever puts a GSM8K score of deepeval beside one of another harness: the gap of a point at the top is made of
# commas alone. Answers in plain text are worse off: the more a model shows its work, the lower it scores, 0 at worst,
# which reads as a model that cannot calculate.
set -euo pipefail
T=$(mktemp -d) && trap 'rm -rf "$T"' EXIT && cd "$T"
python3 -m venv v
v/bin/pip install -q --disable-pip-version-check deepeval==4.3.1 datasets==4.4.1 pandas==2.3.3 pydantic==2.14.4
export DEEPEVAL_TELEMETRY_OPT_OUT=YES HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
from importlib.metadata import version

from deepeval.benchmarks import GSM8K
from deepeval.models import DeepEvalBaseLLM

print("deepeval", version("deepeval"))
ROWS = {  # question: (solution, reference), as in the data set's column `answer`
    "A shop sells 18 pens at $60 each. How much is that?": ("18*60=$<<18*60=1080>>1080", "1,080"),
    "A town of 900,000 grows by 550,000. How many are there?": ("900000+550000=<<900000+550000=1450000>>", "1,450,000"),
    "Nine bags hold 2 apples each. How many is that?": ("9*2=<<9*2=18>>18 apples", "18"),
    "A hall has 30 rows of 40 seats. How many seats?": ("30*40=<<30*40=1200>>1200 seats", "1200"),
}
TEST = [{"question": q, "answer": f"{solution}\n#### {number}"} for q, (solution, number) in ROWS.items()]
TRAIN = [{"question": f"What is {i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(3)]


class Right(DeepEvalBaseLLM):
    """A model that knows every answer. `write` makes its text; None: it fills in the schema, as asked."""

    def __init__(self, write=None):
        self.write, self.prompts = write, []

    def load_model(self):
        return self

    def get_model_name(self):
        return "right"

    def generate(self, prompt, schema=None):
        if schema is not None and self.write:
            raise TypeError("no schema here")  # what deepeval expects of a model that takes none
        self.prompts.append(prompt)
        question = next(q for q in ROWS if q in prompt)
        solution, number = ROWS[question]
        number = int(number.replace(",", ""))
        return self.write(solution, number) if self.write else schema(answer=number)

    async def a_generate(self, prompt, schema=None):
        return self.generate(prompt, schema)


FORMS = {  # and the references that it should and does reach
    "the schema": (None, ["18", "1200"]),
    "1080": (lambda solution, number: f"{number}", ["18", "1200"]),
    "1,080": (lambda solution, number: f"{number:,}", ["1,080", "1,450,000", "18"]),
    "as the examples": (lambda solution, number: f"**Solution**: {solution}\n**Answer**: {number}", []),
    "$1080": (lambda solution, number: f"${number}", []),
    "1080.": (lambda solution, number: f"{number}.", []),
    "1080.0": (lambda solution, number: f"{number}.0", []),
}
for name, (write, expected) in FORMS.items():
    model, benchmark = Right(write), GSM8K(n_shots=3, n_problems=len(TEST), dataset={"train": TRAIN, "test": TEST})
    score = benchmark.evaluate(model).overall_accuracy
    right = [row["Expected Output"] for _, row in benchmark.predictions.iterrows() if row["Correct"]]
    print(f"seen: right answers, written {name:16} score {score}, right where the reference is {right}")
    assert right == expected and score == len(expected) / len(TEST)
    assert "**Solution**: 0+1=" in model.prompts[0] and "Let's think step-by-step." in model.prompts[0]
    assert (not write) or model.prompts[0].endswith("Make sure to output only the numerical answer.")
print(f"seen: so that a model which is right on the 1,319 of the test set gets {(1319 - 14) / 1319:.4f}")
PY
v/bin/python seen.py

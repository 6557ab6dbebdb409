"""A paper for the tests of the laboratory, with a claim for every way a claim can end."""

from paperworks.core.errors import AssetUnavailable
from paperworks.lab import Beats, Lab, Paper, Verdict


def make_paper() -> Paper:
    paper = Paper(
        key="sample",
        title="A <Sample> & Its Claims",
        authors="A. Author",
        year=2020,
        ref="arXiv:0000.00000",
        family="testing",
        summary="Says things.",
        implements=("paperworks.lab.Lab",),
    )

    @paper.claim("it works", paper="Table 1: 7", control="without it")
    def works(lab: Lab) -> Verdict:
        with lab.figure("line") as figure:
            figure.subplots().plot([0, 1], [0, 1])
        lab.text("Said <before>", "<script>alert(1)</script>\nsecond line")
        lab.table("Numbers", ["name", "value"], [["a", 1], ["b", 2.5]])
        return lab.judge({"seven": True}, {"answer": 7, "scale": lab.scale}, control={"answer": 3})

    @paper.claim("it is exact", paper="Equation 2", kind="exact", tour=2)
    def breaks(lab: Lab) -> Verdict:
        raise RuntimeError("the part fell off")

    @paper.claim("it is downloaded", paper="Section 3", kind="parity")
    def lacks_its_file(lab: Lab) -> Verdict:
        raise AssetUnavailable("weights.gguf is not here; put it into ~/weights")

    @paper.claim("it is compared", paper="Table 9", control="a control")
    def forgot_its_control(lab: Lab) -> Verdict:
        return lab.judge({"yes": True}, {"answer": 1})

    @paper.claim("it is better", paper="Figure 4", control="without it", reach="real")
    def is_better(lab: Lab) -> Verdict:
        return lab.compare(
            arms={"with it": lambda seed: {"loss": 0.1 * seed}, "without it": lambda seed: {"loss": 1.0 + 0.2 * seed}},
            main=Beats("with it", "without it", on="loss", by=0.5, lower=True),
            seeds=5,
        )

    return paper

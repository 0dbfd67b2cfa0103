"""What the documents quote from results, and where each number stands: page -> (words of the page, source, metrics).

The source is a study of ``docs/study/results.json`` or a file ``benchmarks/NAME`` of benchmarks/results. The metrics
are those of the numbers in the words, in their order: ``arm metric metric; arm metric``, with ``metric.sd`` and the
like for a number beside the value, and ``_`` for a number that is no result. ``…`` stands for words left out.
"""

Quote = tuple[str, str, str]

DEMO = "digits-default"
UNTUNED = {
    "fashion-mnist-4000-noise": "| 76.2 | **+3.0** | **+2.8** | **+3.5** | **+1.5** | **+5.9** | 1.2x / 2.0x | 9 |",
    "digits-unshifted-noise-40": "| 80.1 | **+4.0** | **+3.9** | **+4.1** | **+3.4** | **+10.4** | 1.5x / 2.3x | 12",
    "digits-unshifted-noise": "| 89.6 | **+1.2** | **+1.8** | **+1.9** | **+2.6** | **+5.5** | 1.5x / 2.0x | 9 |",
    "digits-shifted-noise": "| 95.5 | +0.3 | +0.4 | +0.4 | **+0.8** | +0.2 | 1.5x / 2.1x | 12 |",
    "fashion-mnist-4000-clean": "| 84.4 | **+0.2** | **+0.4** | **+0.6** | **+0.9** | **-0.4** | 1.2x / 2.1x | 9 |",
    "digits-unshifted-clean": "| 96.3 | **+0.2** | **+0.5** | **+0.5** | **+1.1** | **+1.1** | 1.6x / 2.1x | 12 |",
    "cifar10-5000-noise": "| 42.5 | **+5.4** | **+1.9** | **+2.0** | **-0.7** | **+5.8** | 1.2x / 2.0x | 9 |",
    "cifar10-5000-clean": "| 51.8 | **+1.7** | **+0.9** | **+1.3** | **-0.8** | **+1.1** | 1.2x / 2.0x | 9 |",
    "mnist1d": "| 95.4 | +0.2 | +0.4 | +0.3 | **+0.8** | **-1.2** | 1.2x / 2.0x | 9 |",
    "breast-cancer": "| 98.3 | -0.1 | 0.0 | +0.1 | +0.3 | +0.4 | 1.7x / 2.5x | 12 |",
}
"""Row of docs/benchmarks.md by comparison: plain's accuracy, gains, steps of FAM and SAM, seeds."""
FMNOISE, UNSHIFTED, SHIFTED_NOISE, MNIST1D = (
    f"untuned/{name}"
    for name in ("fashion-mnist-4000-noise", "digits-unshifted-noise", "digits-shifted-noise", "mnist1d")
)
CIFAR, CIFARNOISE = "untuned/cifar10-5000-clean", "untuned/cifar10-5000-noise"
SHIFTED, NOISE, FRESH, NINE = (
    "digits-shifted",
    "digits-noise",
    "fashion-mnist-4000-fresh",
    "fashion-mnist-4000-nine",
)
ROW = "accuracy accuracy.sd kappa kappa.sd step"
INTERVAL = "gain gain.low gain.high"

OUTPUT, LAYERS, COST = (f"benchmarks/{name}" for name in ("step_cost_output", "step_cost_layers", "cost_cpu"))
BOTH = "ResNet-18/{0} flops; six-encoder-layers/{0} flops; ResNet-18/{0} step; six-encoder-layers/{0} step"

README: list[Quote] = [
    (
        "each step | **+1.3** (+1.2 to +1.4) | SAM +0.8, label smoothing +0.9 |",
        FRESH,
        f"fam-all {INTERVAL}; sam gain; smoothing gain",
    ),
    (
        "**+3.0** (+2.8 to +3.2) | SAM +2.8, label smoothing +1.5, dropout +5.9 |",
        FMNOISE,
        f"fam-default {INTERVAL}; sam gain; smoothing gain; dropout gain",
    ),
    (
        "**+1.2** (+0.6 to +1.8) | SAM +1.8, label smoothing +2.6, dropout +5.5 |",
        UNSHIFTED,
        f"fam-default {INTERVAL}; sam gain; smoothing gain; dropout gain",
    ),
    (
        "+0.2, no difference shown (p = .53) | SAM +0.4, label smoothing +0.8, dropout -1.2 |",
        MNIST1D,
        "fam-default gain gain.p; sam gain; smoothing gain; dropout gain",
    ),
    (
        "**+1.7** (+1.3 to +2.3) | SAM +0.9, ASAM +1.3, dropout +1.1, label smoothing -0.8 |",
        CIFAR,
        f"fam-default {INTERVAL}; sam gain; asam gain; dropout gain; smoothing gain",
    ),
    (
        "**+5.4** (+4.8 to +5.9) | SAM +1.9, ASAM +2.0, dropout +5.8, label smoothing -0.7 |",
        CIFARNOISE,
        f"fam-default {INTERVAL}; sam gain; asam gain; dropout gain; smoothing gain",
    ),
    ("| FAM, output layer | 1.00x | 1.01x |", OUTPUT, "FAM-output flops step"),
    ("each 8th step | 1.14x | 1.17x |", COST, "_; ResNet-18/default flops step"),
    ("with a penalty alone | 2.09x | 2.30x |", COST, "ResNet-18/all flops step"),
    ("| SAM | 2.00x | 2.02x |", OUTPUT, "SAM-(pytorch_optimizer) flops step"),
]

BENCHMARKS: list[Quote] = [
    *(
        (
            words,
            f"untuned/{study}",
            "plain accuracy; fam-default gain; sam gain; asam gain; smoothing gain; dropout gain; "
            "fam-default step; sam step; plain n",
        )
        for study, words in UNTUNED.items()
    ),
    *(
        (words, f"recipe/{study}", "plain accuracy; fam-default gain; fam gain; sam gain; asam gain")
        for study, words in {
            "digits-noise": "| 93.8 | +0.2 | 0.0 | -0.1 | -0.3 |",
            "digits-noise-40": "| 92.5 | +0.4 | +0.4 | -1.2 | +0.1 |",
        }.items()
    ),
    ("error rises from 26 to 27 %", "recipe/digits-noise", "plain ece; fam-default ece"),
    ("SAM by 1.6 points (p = .002", "recipe/digits-noise-40", "fam-default over_sam over_sam.p"),
    ("(the smallest p is .1)", "recipe/digits-noise-40", "sam gain.p"),
    ("-.6 on digits with 20 % noise (p = .027)", UNSHIFTED, "fam-default over_sam _ over_sam.p"),
    ("-.3 on clean ones (p = .008)", "untuned/digits-unshifted-clean", "fam-default over_sam over_sam.p"),
    ("(p > .1)", FMNOISE, "_"),
    ("ahead of SAM by .8 points (p = .012)", CIFAR, "fam-default over_sam over_sam.p"),
    ("higher than plain's (16.7 against 12.6)", CIFAR, "fam-default kappa; plain kappa"),
    ("on CIFAR-10 FAM is ahead by 3.5 points (p = .004)", CIFARNOISE, "_; fam-default over_sam over_sam.p"),
    ("at 1.4x the step for 1.2x", CIFARNOISE, "dropout step; fam-default step"),
    (
        "from 2.04 to 1.48 by FAM, and the calibration error from 23 to 3 %",
        CIFARNOISE,
        "plain loss; fam-default loss; plain ece; fam-default ece",
    ),
    ("of ASAM by .4 (p = .047)", CIFAR, "fam-default over_asam over_asam.p"),
    (
        "from 1.79 to 1.47, calibration error from 23 to 16 %",
        CIFAR,
        "plain loss; fam-default loss; plain ece; fam-default ece",
    ),
    ("-.2 on clean Fashion-MNIST (p = .016)", "untuned/fashion-mnist-4000-clean", "fam-default over_sam over_sam.p"),
    ("Fashion-MNIST with noise (-.5, p = .004)", FMNOISE, "fam-default over_asam over_asam.p"),
    ("| plain | 93.1 ± 0.9 | 21 ± 2 | 1.00x | weight decay 0.002 |", DEMO, f"plain {ROW} settings.weight_decay"),
    ("| label smoothing | 93.3 ± 0.7 | 21 ± 2 | 1.1x | smoothing 0.1 |", DEMO, f"smoothing {ROW} settings.smoothing"),
    ("| SAM | 91.9 ± 1.1 | 14 ± 1 | 2.1x | rho 0.2 |", DEMO, f"sam {ROW} settings.rho"),
    ("| ASAM | 92.7 ± 0.8 | 15 ± 1 | 2.2x | rho 2 |", DEMO, f"asam {ROW} settings.rho"),
    ("| FAM | 93.3 ± 0.8 | 21 ± 2 | 1.6x | size 0.002 |", DEMO, f"fam {ROW} settings.size"),
    ("FAM +0.2 points (Holm-corrected p = .91)", DEMO, "fam gain gain.p"),
    ("SAM -1.1 (p = .16)", DEMO, "sam gain gain.p"),
    ("ASAM -0.4 (p = .69)", DEMO, "asam gain gain.p"),
    ("plain reached 94.3, SAM was better by 1.0 points (p = .023)", "digits", "plain accuracy; sam gain gain.p"),
    ("a finite radius by 1.1 or", "digits", "fam-radius gain"),
    ("with other random numbers, 0.4", "digits-again", "fam-radius gain"),
    ("Points over plain training (84.4 %), all with Holm p = .031", FRESH, "plain accuracy; fam-all gain.p"),
    ("| FAM, all layers | +1.3 (+1.2 to +1.4) | 3.1x |", FRESH, f"fam-all {INTERVAL} step"),
    ("`layers_per_step=1`** | **+1.1 (+1.0 to +1.2)** | **1.66x** |", FRESH, f"_; fam-one {INTERVAL} step"),
    ("| ASAM; SAM | +0.9; +0.8 | 2.0x |", FRESH, "asam gain; sam gain step"),
    (
        "| label smoothing; dropout | +0.9; +0.8 | 1.0x; 1.3x |",
        FRESH,
        "smoothing gain; dropout gain; smoothing step; dropout step",
    ),
    ('| FAM, output layer, `gradient="frozen"` | +0.8 | 1.1x |', FRESH, "fam-frozen gain step"),
    ("| LookSAM | +0.2 | 1.2x |", FRESH, "looksam gain step"),
    ("said the same of all layers (+1.3)", NINE, "fam-all gain"),
    ("the output layer alone (+0.1, p = .63)", NINE, "fam gain gain.p"),
    (
        "(.9118 ± .0008 plain, .9100 ± .0011 FAM",
        "fashion-mnist",
        "plain test_accuracy test_accuracy.sd; fam test_accuracy test_accuracy.sd",
    ),
    ("it gave 84.3 % where SGD gave 84.3 %", "pre-study", "fashion-mnist/fam accuracy; fashion-mnist/sgd accuracy"),
    (
        "label noise 76.1 % where SGD gave 74.6 % and SAM 82.5 %",
        "pre-study",
        "noisy/fam accuracy; noisy/sgd accuracy; noisy/sam accuracy",
    ),
    (
        "(85.0-85.4 % against 85.1 %;",
        "pre-study",
        "fashion-mnist/radius accuracy.low accuracy.high; fashion-mnist/sam accuracy",
    ),
    (
        "label noise 80.8-82.4 % against 82.5 %)",
        "pre-study",
        "noisy/radius accuracy.low accuracy.high; noisy/sam accuracy",
    ),
    ("(85.7 %; 83.3 %)", "pre-study", "fashion-mnist/dropout accuracy; noisy/dropout accuracy"),
    (
        "radius (55.9 %) and SAM (54.9 %) both hurt (SGD 58.8 %",
        "pre-study",
        "cifar10/radius accuracy; cifar10/sam accuracy; cifar10/sgd accuracy",
    ),
    ("| FAM, output layer | 1.00x | 1.01x |", "benchmarks/step_cost_output", "FAM-output flops step"),
    ("| SAM | 2.00x | 2.02x |", "benchmarks/step_cost_output", "SAM-(pytorch_optimizer) flops step"),
    (
        "a second plain step took 0.998x of the first, FAM's 1.011x has the 95 % interval 0.999 to 1.016",
        "benchmarks/step_cost_output",
        "plain-again step; FAM-output step; _; FAM-output step.low step.high",
    ),
    (
        "| FAM, last block's convolution | 1.00x | 1.06x |",
        "benchmarks/step_cost_convolutions",
        "FAM-last-block's-convolution flops step",
    ),
    ("| 1.14x / 1.19x | 1.17x / 1.19x |", COST, BOTH.format("default")),
    ("a step with a penalty | 2.09x / 2.04x | 2.30x / 2.06x |", COST, BOTH.format("all")),
    ("each 4th step | 1.07x / 1.02x | 1.14x / 1.25x |", COST, "_; " + BOTH.format("one-drawn-every-4")),
    (
        "| 1.38x / 1.40x | 1.62x / 1.38x |",
        LAYERS,
        "FAM-all-convolutions-+-output-gradient=frozen flops; FAM-all-MLP-layers-gradient=frozen flops; "
        "FAM-all-convolutions-+-output-gradient=frozen step; FAM-all-MLP-layers-gradient=frozen step",
    ),
    ("1.17 (0.97 to 1.27) on ResNet-18", COST, "ResNet-18/default step step.low step.high; _"),
    ("needs 2.24 times the memory of a plain one there (SAM 1.16)", COST, "ResNet-18/all peak; ResNet-18/SAM peak"),
    (
        "takes 2.3 training passes over the data with … (median error 4.7 %), 7.5 by default (1.8 %)",
        COST,
        "ResNet-18/GGN-4-probes step error; ResNet-18/by-default step error",
    ),
]

STUDY: list[Quote] = [
    (
        "FAM +3.0 at 1.2x the step, SAM +2.8 at 2.0x, ASAM +3.5, label smoothing +1.5, dropout +5.9",
        FMNOISE,
        "fam-default gain step; sam gain step; asam gain; smoothing gain; dropout gain",
    ),
    (
        "FAM +1.2, SAM +1.8, label smoothing +2.6, dropout +5.5",
        UNSHIFTED,
        "fam-default gain; sam gain; smoothing gain; dropout gain",
    ),
    (
        "FAM gains most: +1.7 at 1.2x the step, ASAM +1.3, dropout +1.1, SAM +0.9 at 2.0x; label smoothing -0.8",
        CIFAR,
        "fam-default gain step; asam gain; dropout gain; sam gain step; smoothing gain",
    ),
    (
        "FAM +5.4 at 1.2x the step, dropout +5.8 at 1.4x, ASAM +2.0 and SAM +1.9 at 2.0x; label smoothing -0.7",
        CIFARNOISE,
        "fam-default gain step; dropout gain step; asam gain; sam gain step; smoothing gain",
    ),
    ("FAM as it comes +0.2, SAM -0.1, ASAM -0.3", "recipe/digits-noise", "fam-default gain; sam gain; asam gain"),
    (
        "no difference shown for any: FAM +0.4, SAM -1.2, ASAM +0.1",
        "recipe/digits-noise-40",
        "fam-default gain; sam gain; asam gain",
    ),
    ("label smoothing alone is better (+0.8); FAM +0.3", SHIFTED_NOISE, "smoothing gain; fam-default gain"),
    ("label smoothing +0.8, dropout -1.2; FAM +0.2", MNIST1D, "smoothing gain; dropout gain; fam-default gain"),
    (
        "FAM +4.0 as SAM +3.9, label smoothing +3.4, dropout +10.4",
        "untuned/digits-unshifted-noise-40",
        "fam-default gain; sam gain; smoothing gain; dropout gain",
    ),
    (
        "FAM +0.2, SAM +0.5, label smoothing and dropout +1.1",
        "untuned/digits-unshifted-clean",
        "fam-default gain; sam gain; smoothing gain",
    ),
    (
        "label smoothing +0.9, ASAM +0.6, SAM +0.4, FAM +0.2; dropout -0.4",
        "untuned/fashion-mnist-4000-clean",
        "smoothing gain; asam gain; sam gain; fam-default gain; dropout gain",
    ),
    ("any arm; FAM -0.1", "untuned/breast-cancer", "fam-default gain"),
    ("below .02 and .0024", "untuned/digits-unshifted-clean", "_; smoothing gain.p"),
    ("for FAM by default (+0.2), SAM (-1.1) or any other arm", DEMO, "fam gain; sam gain"),
    ("SAM +1.0, a finite radius +1.1 points; kappa itself does not", "digits", "sam gain; fam-radius gain"),
    (
        "SAM +1.0; the radius +0.4, no difference shown: another radius was chosen (.35 for .5)",
        "digits-again",
        "sam gain; fam-radius gain settings.radius _",
    ),
    ("dropout +0.9, plain Gaussian noise +0.8", NOISE, "dropout gain; noise gain"),
    ("SAM (-1.0), kappa itself (-0.4) or the radius (-0.2)", SHIFTED, "sam gain; fam gain; fam-radius gain"),
    (
        "64² output layer: 2 ms for 317 ms; a step of a small CNN +11 %",
        "reproduce/cost",
        "_; output/64/closed ms; output/64/vectorised ms; FAM-output-closed-form added",
    ),
    ("gains .02 Dice (1 seed)", "reproduce/table2", "weights/0.02 gain n"),
    ("not here: 0.0 points (p = 1, 5 seeds)", "reproduce/table3", "fam gain gain.p n"),
    ("tau -.35 to -.47 over 26 networks", "reproduce/layers", "normalised/fc1 tau; normalised/fc4 tau n"),
    (
        "tau -.01 (-.38 to +.34) over 24 networks; the weight norm has +.70",
        "reproduce/correlation",
        "normalised/kappa tau tau.low tau.high n; normalised/weight_norm tau",
    ),
    (
        "all layers again +1.3 (p = .031); one drawn for each step +1.1 at half the price, cheaper than SAM (+0.8); "
        "LookSAM +0.2",
        FRESH,
        "fam-all gain gain.p; fam-one gain; sam gain; looksam gain",
    ),
    (
        "kappa of all layers +1.3 (p = .039) at 3.5x the step, ahead of ASAM +1.0 and SAM +0.8",
        NINE,
        "fam-all gain gain.p step; asam gain; sam gain",
    ),
]

REPRODUCE: list[Quote] = [
    (
        "CIFAR-10 SAM -0.3 (p = .09), FAM 0.0; Fashion-MNIST SAM -0.2 (p = .06), FAM -0.1 (p = .17)",
        "reproduce/table1",
        "_; cifar10/sam gain gain.p; cifar10/fam gain; fashion-mnist/sam gain gain.p; fashion-mnist/fam gain gain.p",
    ),
    ("Dice falls from .63 to between .14 and .49", "reproduce/table2", "plain dice; full/0.1 dice; full/0.0006 dice"),
    ("Dice is +.02 at best, where the paper has +.07", "reproduce/table2", "weights/0.02 gain _"),
    (
        "FAM 0.0 points (-0.2 to +0.2, p = 1) at the weakest strength of its grid, .001",
        "reproduce/table3",
        "fam gain gain.low gain.high gain.p strength",
    ),
    (
        "64² output layer 2.0 ms in closed form, 317 ms by the fastest full Hessian, hidden 9 against 157 ms",
        "reproduce/cost",
        "_; output/64/closed ms; output/64/vectorised ms; hidden/64/ggn ms; hidden/64/vectorised ms",
    ),
    ("small CNN +11 % (SAM +104 %)", "reproduce/cost", "FAM-output-closed-form added; SAM added"),
    (
        "the gap -.01 (-.38 to +.34) over 24 networks; the weight norm has +.70",
        "reproduce/correlation",
        "normalised/kappa tau tau.low tau.high n; normalised/weight_norm tau",
    ),
    (
        "neurons (to 2e-15), Tr H, lambda_max, PAC-Bayes and SAM's sharpness change by factors of 160 to 320",
        "reproduce/invariance",
        "rotation-output/kappa change; layers-output/pac_bayes factor; layers-output/trace factor",
    ),
    ("on each of 3 seeds a negative strength", "reproduce/grokking", "away-from-flat n"),
]

FASHION: list[Quote] = [
    *(
        (f"| {words} |", "fashion-mnist", f"plain {metric} {metric}.sd; fam {metric} {metric}.sd")
        for words, metric in {
            "test accuracy | .9118 ± .0008 | .9100 ± .0011": "test_accuracy",
            "test loss | .2482 ± .0010 | .2516 ± .0017": "test_loss",
            "validation accuracy | .9100 ± .0003 | .9116 ± .0010": "validation_accuracy",
            "training accuracy | .9448 ± .0017 | .9421 ± .0006": "train_accuracy",
            "kappa of the output layer | 7.57 ± .13 | 2.60 ± .01": "kappa",
            "confidence | .923 ± .001 | .922 ± .001": "confidence",
            "norm of the output weight | 7.71 ± .03 | 7.85 ± .03": "weight_norm",
        }.items()
    ),
    (
        "−.0018 on test (all three seeds −.0002 to −.0027), +.0016 on validation",
        "fashion-mnist",
        "fam gain gain.high gain.low validation_gain",
    ),
]

CALLED = {"fam-output": "fam"}  # when the runs were made
GRIDS: list[Quote] = [  # of arms that no committed run has timed
    (f"| `{arm}` | … | size 0.001, 0.002, 0.004, 0.008 | 0.004 |", NINE, "_; _; _; _; _")
    for arm in ("fam-one", "fam-sam")
]
GRIDS.append(("| `fam` | … | bound 0.3, 0.6, 1.2, 2.4 | 0.3 |", NINE, "_; _; _; _; _"))
GRIDS.append(("| `fam-default` | … | none | 0.004 | 1.21 |", FMNOISE, "_; fam-default step"))
COMPARE: list[Quote] = [
    (f"| `{arm}` | … | {time} |", study, f"{CALLED.get(arm, arm)} step")
    for study, times in {
        NINE: {
            "plain": "1",
            "smoothing": "1.01",
            "dropout": "1.32",
            "noise": "1.21",
            "sam": "2.02",
            "asam": "2.03",
            "looksam": "1.24",
            "fam-output": "1.10",
            "fam-frozen": "1.10",
            "fam-radius": "1.56",
        },
        "step-times": {"fam-weights": "1.13"},
    }.items()
    for arm, time in times.items()
]

TASKS: list[Quote] = [
    ("| `fashion-mnist` | .912 |", "fashion-mnist", "plain test_accuracy"),
    ("| `digits` | .973 |", "tasks", "digits accuracy"),
    ("| `mnist1d` | .954 |", "tasks", "mnist1d accuracy"),
    ("| `cifar10-resnet20` | .719 |", "tasks", "cifar10-resnet20 accuracy"),
    ("| `reviews` | .880 |", "tasks", "reviews accuracy"),
    ("| `cifar10-finetune` | .817 |", "tasks", "cifar10-finetune accuracy"),
    ("| `addition` | 1.000 |", "tasks", "addition accuracy"),
    ("| `addition-transformer` | 1.000 |", "tasks", "addition-transformer accuracy"),
    *(
        (f"| {words} |", "tasks", f"skulls/{arm} dice implant_dice hd95 spread")
        for words, arm in {
            "nothing: the defective skull as it is | .986 | 0 | 0 | .99": "nothing",
            "mean training skull, threshold best for Dice | .561 | .050 | 12.7 | 0": "mean",
            "mean training skull, threshold best for implant Dice | .404 | .078 | 16.8 | 0": "mean-for-implant",
            "`skulls`, autoencoder | .654 | .078 | 10.2 | .66": "autoencoder",
            "`skulls-unet` | .988 | .312 | 0 | .99": "unet",
        }.items()
    ),
]

LAYERS: list[Quote] = [
    ("drawing one layer gained 1.1 points where all of them gained 1.3", FRESH, "fam-one gain; fam-all gain")
]

VOCABULARY, PLAIN_AND_FULL = (
    "benchmarks/vocabulary_memory",
    "131072-classes/logits-+-F.cross_entropy gib; 131072-classes/full gib",
)

ESTIMATORS: list[Quote] = [
    (
        words,
        "benchmarks/estimators",
        "; ".join(
            f"{case}/{name} rmse_6 rmse_12 rmse_24 rmse_equal_time"
            for case in ("conv", "linear", "mlp", "transformer")
        ),
    )
    for name, words in {
        "logit-space-signs-(default)": "| 4.9 / 3.3 / 2.2 / 3.3 | 5.3 / 3.5 / 2.3 / 3.5 | 5.1 / 3.4 / 2.4 / 3.4 | 6.8 / 4.0 / 2.4 / 4.2 |",
        "Hutchinson-a-probe-a-sample": "| 6.8 / 3.6 / 3.9 / 9.5 | 6.2 / 4.3 / 3.8 / 9.5 | 7.5 / 5.5 / 3.4 / 10.1 | 14.8 / 7.9 / 5.9 / 28.9 |",
        "Hutchinson-a-probe-a-batch": "| 27.3 / 19.3 / 14.3 / 27.3 | 21.9 / 17.5 / 13.3 / 19.4 | 22.1 / 19.0 / 15.2 / 19.5 | 21.8 / 15.9 / 9.8 / 22.9 |",
        "Hutch++": "| 26.4 / 5.4 / 1.2 / 26.4 | 24.3 / 8.0 / 1.2 / 24.3 | 20.7 / 9.1 / 1.9 / 20.7 | 20.4 / 8.4 / 3.9 / 45.0 |",
        "XTrace": "| 14.6 / 4.0 / 0.7 / 18.4 | 20.3 / 5.1 / 0.5 / 20.3 | 32.9 / 8.9 / 0.9 / 32.9 | 21.2 / 8.3 / 2.2 / 31.6 |",
        "Hutch++-of-curvlinops": "| 20.1 / 7.3 / 1.3 / 20.1 | 20.4 / 8.6 / 0.9 / 49.1 | 22.3 / 11.9 / 2.3 / 54.2 | 24.8 / 10.3 / 3.7 / 38.6 |",
        "XTrace-of-curvlinops": "| 18.0 / 4.6 / 1.0 / 10.0 | 23.9 / 6.2 / 0.7 / 50.8 | 22.7 / 10.7 / 1.0 / 36.3 | 27.8 / 7.4 / 1.9 / 32.6 |",
        "probes-(default)-with-kappa": "| 5.1 / 3.4 / 2.1 / 3.4 | 5.1 / 3.3 / 2.2 / 3.3 | 5.1 / 3.4 / 2.4 / 3.4 | 6.8 / 6.8 / 4.2 / 6.8 |",
        "PyHessian-the-layer-alone-trainable": "| 22.5 / 19.2 / 14.8 / 21.5 | 25.5 / 20.1 / 12.8 / 22.3 | 21.3 / 12.3 / 8.6 / 10.1 | 16.9 / 12.3 / 8.5 / 7.7 |",
    }.items()
]
MEASURING: list[Quote] = [
    ("| probes, Hessian | 3.3 | 0.00 | 0.90 |", "benchmarks/calibration", "all/probe(hessian) beyond_2 beyond_4 rms"),
    (
        "| probes, Gauss-Newton matrix | 1.9 | 0.00 | 0.79 |",
        "benchmarks/calibration",
        "all/probe(ggn) beyond_2 beyond_4 rms",
    ),
    (
        "| probes in the weight, Hessian | 3.3 | 0.07 | 0.92 |",
        "benchmarks/calibration",
        "all/probe(hessian-in-weight) beyond_2 beyond_4 rms",
    ),
    (
        "| probes in the weight, Gauss-Newton matrix | 0.9 | 0.00 | 0.69 |",
        "benchmarks/calibration",
        "all/probe(ggn-in-weight) beyond_2 beyond_4 rms",
    ),
    (
        "| finite differences | 1.9 | 0.00 | 0.73 |",
        "benchmarks/calibration",
        "all/finite_difference beyond_2 beyond_4 rms",
    ),
    ("| XTrace | 2.0 | 0.00 | 0.77 |", "benchmarks/calibration", "all/xtrace beyond_2 beyond_4 rms"),
]

QUOTES = {
    "README.md": README,
    "docs/benchmarks.md": BENCHMARKS
    + ESTIMATORS
    + [("12.0 GiB, both with kappa in chunks take 0.41", VOCABULARY, PLAIN_AND_FULL)],
    "docs/compare.md": COMPARE + GRIDS,
    "docs/distributed.md": [("classes 12.0 GiB are 0.41", VOCABULARY, PLAIN_AND_FULL)],
    "docs/howto/layers.md": LAYERS,
    "docs/howto/measuring.md": MEASURING,
    "docs/reproduce.md": REPRODUCE,
    "docs/study/README.md": STUDY,
    "docs/study/fashion-mnist.md": FASHION,
    "docs/tasks.md": TASKS,
}

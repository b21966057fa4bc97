"""The fixed plain-language texts of the report: what each check asks, what each word means, what is not shown."""

from __future__ import annotations

NOT_EVALUATED = "not evaluated"

ENCODERS = {
    "original": ("Original", "the encoder as it was, trained on all member images, the forgotten ones included"),
    "unlearned": ("Unlearned", "the same encoder after the forgetting; this is the one that is being judged"),
    "retrained": ("Retrained", "an encoder trained from the beginning without the forgotten images; the yardstick"),
}

# verdict -> (word on the badge, what it means in general)
VERDICTS = {
    "pass": (
        "Pass",
        "Every check that was declared before the run came out inside its limits: by these checks the unlearned "
        "encoder cannot be told from one that never saw the forgotten images, and it is still as useful.",
    ),
    "fail": (
        "Fail",
        "At least one check came out clearly outside its limits: the unlearned encoder still gives the forgotten "
        "images away, or it has lost too much of its use. The request should not be called fulfilled.",
    ),
    "inconclusive": (
        "Inconclusive",
        "At least one check could not be settled either way, for example because there are too few images for a "
        "precise answer, and none came out clearly outside its limits. This is not a pass.",
    ),
    "not_evaluated": (
        "Not evaluated",
        "The evidence is missing, so nothing can be said. This is not a pass.",
    ),
}

# verdict -> what to do now
NEXT = {
    "pass": "`distunlearn purge {folder}` lists the forgotten images in the shards; `--apply` deletes them.",
    "purged": "sign what this run shows: `distunlearn certify {folder} --key KEY`.",
    "fail": "do not call the request fulfilled; `distunlearn sweep` searches for settings that pass its checks.",
    "inconclusive": "settle what is not settled: the report gives each reason, and most often it takes more images.",
    "not_evaluated": "`distunlearn audit {folder}`.",
}

# section of the page -> its name in the table of contents
CONTENTS = (
    ("asked", "What was asked, and what was done"),
    ("compare", "The encoders that are compared"),
    ("gates", "The checks agreed beforehand"),
    ("spread", "Do the forgotten images still stand out?"),
    ("gradients", "How much would the encoder still have to learn?"),
    ("roc", "How well could an attacker do?"),
    ("useful", "Is the encoder still useful?"),
    ("non-members", "Forgotten images against non-members"),
    ("controls", "Can these checks be trusted?"),
    ("cost", "What it cost"),
    ("limits", "What this does not show"),
    ("assurance", "Evidence that others can check"),
    ("origin", "Where these figures come from"),
)

# what a certificate lets others check, by level, and what they need for it beside the certificate
LEVELS = (
    ("0", "the statement itself: who signed it, and what was declared before the run", "nothing more"),
    ("1", "the exported encoder is the one that was judged", "the export"),
    ("2", "the record of the run, and every figure from the raw scores", "the run directory"),
    ("3", "the attacks, by an audit of one's own", "the run directory and the images"),
    ("4", "the training, by repeating steps of it", "the run directory, the images and the checkpoints"),
)

# name -> (title, the question it asks, the words under the axis)
ATTACKS = {
    "view_agreement": (
        "View agreement",
        "Does the encoder find two random cut-outs of an image more alike than it would for an unknown image?",
        "how alike the cut-outs of an image are",
    ),
    "encodermi_vector": (
        "EncoderMI classifier",
        "Can a small program, trained to tell known from unknown images by the way their views agree, "
        "pick out the forgotten ones?",
        "classifier's belief that the image is known",
    ),
    "bank_loss": (
        "Training loss",
        "Is the encoder less surprised by the image than by an unknown one?",
        "loss with its sign turned (right: less surprise)",
    ),
    "gradient_norm_network": (
        "Gradient size (whole network)",
        "Would the encoder have to change less to fit the image than to fit an unknown one?",
        "size of the change the image asks for",
    ),
    "gradient_norm_head": (
        "Gradient size (last layer)",
        "The same question, asked of the last layer only.",
        "size of the change the image asks for",
    ),
    "encodermi_set": (
        "EncoderMI, set form",
        "The same small program, told only how alike the views are, not in which order.",
        "classifier's belief that the image is known",
    ),
    "encodermi_threshold": (
        "EncoderMI, threshold form",
        "Are the views of an image alike in what an exported encoder gives away?",
        "how alike the views of an image are",
    ),
    "embedding_norm": (
        "Length of the embedding",
        "Does the encoder answer an image with a longer or shorter list of numbers than an unknown one?",
        "likelihood that the image is known",
    ),
    "gradient_sketch": (
        "Gradient classifier (whole network)",
        "Can a small program pick out the forgotten images by how each layer would change for them?",
        "classifier's belief that the image is known",
    ),
    "part_crop": (
        "PartCrop",
        "Does the encoder find small parts of an image in it more surely than in an unknown one?",
        "classifier's belief that the image is known",
    ),
    "rmia": (
        "RMIA",
        "Is the encoder surer of the image than the retrained one is, more so than for non-members?",
        "share of non-members that the image beats",
    ),
    "lira_alignment": (
        "LiRA on view agreement",
        "Do the views agree more than they do in the retrained encoder?",
        "agreement beyond that of the retrained encoder",
    ),
    "alignment_gap": (
        "Alignment gap",
        "Who holds the encoder before and after: which images' views agree less than before?",
        "agreement lost since the original encoder",
    ),
}

# stress test, or part of one -> (title, what was asked)
STRESS = {
    ("worst_case", "most"): ("Memorised most", "the third of the forgotten images that the original encoder knew best"),
    ("worst_case", "random"): ("A random third", "for comparison with the other two thirds"),
    ("worst_case", "least"): ("Memorised least", "the third that the original encoder knew least"),
    ("whole_class",): ("A whole class", "every image of the largest class, against unseen images of that class"),
    ("canaries", "1"): ("In the data once", "images to forget, each in the training data once"),
    ("canaries", "2"): ("In the data twice", "each in the training data twice, and both copies forgotten"),
    ("canaries", "4"): ("In the data four times", "each in the training data four times, and all copies forgotten"),
    ("sequential", "all"): ("Three requests in turn", "each starting from the encoder that the last one left"),
    ("sequential", "at_once"): ("The same in one request", "this run's own encoder, for comparison"),
}

UTILITY = {
    "knn": ("Nearest neighbours", "share of unseen images whose closest known images have the same label"),
    "linear_probe": ("Linear probe", "share of unseen images that a simple classifier on the encoder labels rightly"),
}

ROLES = {
    "retain": ("Retained", "training images that stay"),
    "forget": ("Forgotten", "training images that the request asks to remove"),
    "third_party": (
        "Third-party",
        "images the encoder was never trained on; they show it how a non-member looks",
    ),
    "third_party_audit": ("Third-party, for the audit", "images of the same kind that the forgetting never used"),
    "watch": ("Watch", "images never trained on, by which the dose was chosen; in no loss and in no audit"),
    "calibration": ("Calibration", "images never trained on, used to set thresholds; in no audit"),
    "holdout": ("Held out", "images never trained on, used by nothing but this audit"),
}

SOURCES = {
    "digits": "handwritten digits (scikit-learn)",
    "fashion_mnist": "Fashion-MNIST clothing pictures",
    "cifar10": "CIFAR-10 photographs",
    "cifar100": "CIFAR-100 photographs",
    "stl10": "STL-10 photographs",
    "imagefolder": "a folder of image files",
    "dataset": "datasets that were handed over in Python",
    "webdataset": "existing WebDataset shards",
}

RETRAINED_LIMIT = "One retrained encoder is one sample."  # said where there is one
OWN_FORMULAS = "The exact formulas are this software's own."  # said of the method of that paper
LIMITS = (
    (
        "It is evidence, not a proof.",
        "The forgetting is empirical. There is no mathematical certificate, and nothing here bounds what "
        "an unknown method could still find out.",
    ),
    (
        "Only the listed attacks were tried.",
        "Another attack, or one with more knowledge of the training, may do better. A result near 0.50 means that "
        "these attacks learn nothing, not that no attack can.",
    ),
    (
        "An average is not a promise to each person.",
        "The figures describe the forgotten images as a group. A single image in the group may be easier "
        "to recognise than the average says.",
    ),
    (
        RETRAINED_LIMIT,
        "Training has chance in it. A second encoder retrained in the same way would give slightly different "
        "figures; the intervals cover the chance in the images, not in the training.",
    ),
    (
        "The third-party images matter.",
        "If they differ in kind from the forgotten ones, the forgetting may aim at the wrong target. The controls "
        "above say whether they could be told apart; images from elsewhere may behave in another way.",
    ),
    (
        OWN_FORMULAS,
        "The method follows the idea of Chen, Wang and Mi (Mathematics 12(24):4001, 2024). The loss terms and the "
        "distances between gradients are this project's own and not those of the paper.",
    ),
    (
        "Only this encoder was judged.",
        "Copies made earlier, backups, encoders trained from it, and the image files themselves are outside "
        "the reach of this report.",
    ),
)


def attack_words(name: str) -> tuple[str, str, str]:
    """Title, question and axis label of an attack; an unknown one keeps its own name and has no explanation."""
    if name in ATTACKS:
        return ATTACKS[name]
    title = name.replace("_", " ").strip()
    return title[:1].upper() + title[1:], "", "score"

"""The public data sets this project knows by name: what each file is, its hash, and where it is published."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One published file.

    `file` is its place under a data folder; `repository` and `path` name it on GitHub.
    """

    name: str
    file: str
    repository: str
    path: str
    licence: str
    sha256: str
    note: str = ""

    @property
    def published(self) -> str:
        """Where it is published, in words."""
        return f"GitHub {self.repository}: {self.path}"


_TEXTS = (
    DataSource(
        name="tinyshakespeare",
        file="text/tinyshakespeare.txt",
        repository="karpathy/char-rnn",
        path="data/tinyshakespeare/input.txt",
        licence="public domain",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        note="1.1 MB of Shakespeare's plays",
    ),
    DataSource(
        name="names",
        file="text/names.txt",
        repository="karpathy/makemore",
        path="names.txt",
        licence="MIT",
        sha256="0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
        note="32,033 first names, one a line",
    ),
)

_RECORDS = (
    DataSource(
        name="gsm8k-train",
        file="gsm8k/train.jsonl",
        repository="openai/grade-school-math",
        path="grade_school_math/data/train.jsonl",
        licence="MIT",
        sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        note="grade-school word problems: question, answer",
    ),
    DataSource(
        name="gsm8k-test",
        file="gsm8k/test.jsonl",
        repository="openai/grade-school-math",
        path="grade_school_math/data/test.jsonl",
        licence="MIT",
        sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        note="grade-school word problems: question, answer",
    ),
    DataSource(
        name="self-instruct",
        file="instructions/self_instruct_seed_tasks.jsonl",
        repository="yizhongw/self-instruct",
        path="data/seed_tasks.jsonl",
        licence="Apache-2.0",
        sha256="7779004fa198fdf27cf70a159363879d8a26c53329e11b436af17b3941875f48",
        note="175 hand-written instructions with instances",
    ),
    DataSource(
        name="hh-harmless-test",
        file="preferences/hh_harmless_base_test.jsonl.gz",
        repository="anthropics/hh-rlhf",
        path="harmless-base/test.jsonl.gz",
        licence="MIT",
        sha256="ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
        note="dialogue pairs, chosen and rejected; holds offensive text, by purpose",
    ),
)


def _emotion(name: str, sha256: str, file: str, note: str) -> DataSource:
    folder = "facts" if file.endswith(".csv") else "emotions"
    return DataSource(
        name=name,
        file=f"representation-engineering/{file}",
        repository="andyzoujm/representation-engineering",
        path=f"data/{folder}/{file}",
        licence="MIT",
        sha256=sha256,
        note=note,
    )


_EMOTIONS = (
    _emotion(
        "emotions/anger", "4577af8b0c62b18e3f06fb96883e95ed7b776f0809f605bfe792e438fe1832df", "anger.json", "scenarios"
    ),
    _emotion(
        "emotions/disgust",
        "3532b5d3c3701ad23c799dd436a86db81b716ecd41b35e890e2fb2ae4a80dfff",
        "disgust.json",
        "scenarios",
    ),
    _emotion(
        "emotions/fear", "cf791978f94f62ec617480a646f3a16d38aaf594a385c698bec08bf32747ee2b", "fear.json", "scenarios"
    ),
    _emotion(
        "emotions/happiness",
        "3dedefdc819007074a1a53c7a606d1e5661ac0cc19984212aa809c3a9f6bb646",
        "happiness.json",
        "scenarios",
    ),
    _emotion(
        "emotions/happiness_fear",
        "bc1c6e8bd7f4d0e5fa30add265693cb4a7e89df5cf65d656c0f2b1489e06962f",
        "happiness_fear.json",
        "scenarios",
    ),
    _emotion(
        "emotions/happiness_sadness",
        "5534d3e382458e6b12fed6be17142851f00a371d124917adf0bee0d5c6f425ab",
        "happiness_sadness.json",
        "scenarios",
    ),
    _emotion(
        "emotions/sadness",
        "999065615aac1bfb95c5cec054965f9abf17f36d59c7a779916eb28eb3f4ea24",
        "sadness.json",
        "scenarios",
    ),
    _emotion(
        "emotions/surprise",
        "43d90c0bbf755c789373286e35bc522461f9fe960fb5e3c5586a1749e19c7812",
        "surprise.json",
        "scenarios",
    ),
    _emotion(
        "truncated-outputs",
        "c87990913b839fa792b751b532a8f9abc372770bf4d34a1de358a3a233edb6e5",
        "all_truncated_outputs.json",
        "beginnings of answers",
    ),
    _emotion(
        "facts",
        "151b6163289460eb8b37f7c6a1998e23aed8e05b5e557bf1a2297079bf0e5af9",
        "facts_true_false.csv",
        "statement, label",
    ),
)

_TRUTH_HASHES = (
    ("animal_class", "598ed996dd00dd6cddcf125fafad48ad7c4d827a91dfbd8202473354fdba0d97"),
    ("animal_class_conj", "74f4930c00460a33cfaea6cc9f248943e05588e5a05edbaf90907dcba42c08d0"),
    ("animal_class_de", "9f08cab2a4c4f92a2ad0554ab33a49844f2afad27d86096b9b86338b7d06ff87"),
    ("animal_class_disj", "27b69dfd89adc558b8c7703a66ff59f7bc5c242b8558668d08be3d3989e6e94f"),
    ("cities", "f2560a0c1758c69935b50125111b574b71896bb75930dd87b1d8c973c1fa086e"),
    ("cities_conj", "80e9987e8abcdd56ac8256d22b8ad6c2d6211e06a6c925c32cfcb0bc93d9d56d"),
    ("cities_de", "86393185de661eec2ca3bcf2fd2bc88ff1e3a6203594930dd0cf9b77b1b03a2e"),
    ("cities_disj", "b1502f41839d0e952a60705997156891a79b96c3a00ef6b51379eaa3ff22ef99"),
    ("common_claim_true_false", "1889b4793c2ebd13c767eea8b65ebd4a5c2da700567677d512097b495a262576"),
    ("counterfact_true_false", "5af51456d6dbd3a53d8e2ee6e4aadaca7eb02ff9136ad825866458e7283b5273"),
    ("element_symb", "2aa8da5696a1f0f0c4630b7a75949cf47e81254728be13c0f4e835ed6129a5a6"),
    ("element_symb_conj", "23f78642b7bcbf336bab2f4fd296c67cee82bd92ddc359bf4cee081e8b7293be"),
    ("element_symb_de", "7d84e73330ed7f38e6e530f99cf66fc46a17d811cdce9436b4774e6d5707f880"),
    ("element_symb_disj", "dbd140d4a076ecba2069f69c10f8223f630a6a7ddaefe9d0bb08a23a00c2cd44"),
    ("facts", "303ec926c2710a13a6166e204a24ea013bb2991b8761e2899739fddcb923aee1"),
    ("facts_conj", "5e7263fcffdd9c70bcdee90d4ef67fa254d26d4f442f63971be65f1916e7b47a"),
    ("facts_de", "f45f4fdab2d5c6337b1a4ce25403deb0d051d7ab319700687d3c8ddad686cc93"),
    ("facts_disj", "41fbe79320302e479671cbc9c7073e3cd5ebf131c736968583f67be49f64f3c4"),
    ("inventors", "6990771f01efcbae18bfa3960facbe36c39199f850f407540548a9c04339084c"),
    ("inventors_conj", "734158e97b51dcb99985107e8a7457fa4b19a06fc98257f2e5aae12c3e169e34"),
    ("inventors_de", "789adde792496d64a4e1b9928e6cacdaf75d2416a66446a0b753f4b094d95c21"),
    ("inventors_disj", "f663a225e351f2a3620ef6be7e1b034e713e8be736744b0cb173fbc18a22fbdb"),
    ("larger_than", "406d6872e97910f3af5a031600d4932b5a567b8666e7545c8b446057471ad723"),
    ("neg_animal_class", "03676e51600e8357e4e200d08eca7c38952b07a5aef807d5aaefbedc7f257256"),
    ("neg_animal_class_de", "c5110e0f7415a76f34038ef94fe93630b67bcd8c04334e75f826a9671ad5c2aa"),
    ("neg_cities", "66c5c84de98ca15570138c205ab0e3907b57750083fac72a4eacafc3d9ebcea7"),
    ("neg_cities_de", "adf70b8d631a34d75802a4c9eb661bf4186a7e76781da9652ae19eb13b28997d"),
    ("neg_element_symb", "8ee4b64b38fe1e43fb0e794d5acf914f9af4f8a9a99f3df187bfd84f429ffa78"),
    ("neg_element_symb_de", "55bd9425ab50aaf49b066aac5a66672264d60dacd35b24f7e8ad2dc5aed10acd"),
    ("neg_facts", "84c26b283996d4016d3a9b470f09a6b9fe721d9f68444893c060e3ea8419287a"),
    ("neg_facts_de", "a695ffe79d778b2b6c061ee1e5b7a1d78fcd8c165afafe2a24a58b19cc671707"),
    ("neg_inventors", "f275742ae02a1d2ca11e90d25753b2d3a90f4788f6399e22442cd7774b7db8a7"),
    ("neg_inventors_de", "c712a84c976c7e19478a075e98711493de98d81d403811b82b0901f779786e8e"),
    ("neg_sp_en_trans", "bec33e37047135b15cdd18c0cb0c66b65fb435ace08910cbcc220ce1ef610c96"),
    ("neg_sp_en_trans_de", "45dbe326a4482148d47d808df646fe66cccd76c1efea2de693cf77420b29946e"),
    ("smaller_than", "ee6b7cf668d7e0fb3f49a84ca8d510cb7e484ae029ef86ed238362e26ef61a44"),
    ("sp_en_trans", "9afa97c1b8af539a05f47655a80a5c7832c6fdb914885fd24cb4bcccbe2795b5"),
    ("sp_en_trans_conj", "0abfdb4038c0588ed765e6126d7bd938e50878ee0d8d550e8e86ecdaa610ab63"),
    ("sp_en_trans_de", "3bcee83a71b9be8629ccb8c38fc843ae896a22fd20536b7d8962bc67d2a51b18"),
    ("sp_en_trans_disj", "8109acc93bb7b21d8124850f477c0b306a6513b9e351141efb1ac1518bd6bb8e"),
)

_TRUTH = tuple(
    DataSource(
        name=f"truth/{topic}",
        file=f"truth/{topic}.csv",
        repository="sciai-lab/Truth_is_Universal",
        path=f"datasets/{topic}.csv",
        licence="MIT",
        sha256=sha256,
        note="statement, label (1 true, 0 false)",
    )
    for topic, sha256 in _TRUTH_HASHES
)

SOURCES: dict[str, DataSource] = {source.name: source for source in (*_TEXTS, *_RECORDS, *_EMOTIONS, *_TRUTH)}

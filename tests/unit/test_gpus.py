from __future__ import annotations

import pytest

from pretrain import gpus


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM"),
        ("Tesla V100-PCIE-32GB", "V100 PCIe"),
        ("Tesla V100S-PCIE-32GB", "V100S"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", ""),
        ("NVIDIA GeForce RTX 4090 D", ""),
        ("NVIDIA T400", ""),
        ("NVIDIA B300 SXM6 AC", ""),
    ],
)
def test_driver_names_match_their_own_entry_only(name: str, label: str) -> None:
    assert gpus.match_gpu(name) == label


def test_every_entry_can_be_reached_and_its_rates_are_in_order() -> None:
    for label, peak in gpus.PEAK_FLOPS.items():
        assert gpus.match_gpu(f"NVIDIA {peak.pattern}") == label
        assert peak.bf16 in (0, peak.fp16) and peak.fp16 >= peak.tf32 and peak.fp16 > peak.fp32 > 0
        assert peak.tf32 == 0 or peak.tf32 == pytest.approx(peak.fp16 / 2, rel=0.03)


def test_every_card_has_a_peak_rate_and_plausible_figures() -> None:
    for name, card in gpus.CARDS.items():
        assert name == name.lower() and card.peak in gpus.PEAK_FLOPS
        assert 16 <= card.memory_gb <= 200 and 70 <= card.power_w <= 1200


def test_a_published_efficiency_is_that_of_the_nearest_size() -> None:
    efficiency = gpus.expected_mfu("H100 SXM", 1_315_723_264)
    assert efficiency.mfu == 0.418 and "LLM Foundry" in efficiency.source and "assumed" not in efficiency.source
    assert gpus.expected_mfu("A100", 10**12).mfu == 0.642  # clamped to the largest


def test_what_nobody_published_is_called_assumed() -> None:
    assert gpus.expected_mfu("H200 SXM", 10**9).source.startswith("assumed as on H100 SXM")
    assert gpus.expected_mfu("T4", 10**9) == (gpus.ASSUMED_MFU, gpus.expected_mfu("T4", 1).source)
    assert gpus.expected_mfu("T4", 10**9).source.startswith("assumed")

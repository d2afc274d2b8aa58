"""Keras models on LiteRT: conversion, quantisation, checking, delegates and latency.

This is the only package of the project that imports LiteRT or its quantizer, and it does so inside
functions: importing it is light.
"""

from __future__ import annotations

from tfprune.litert.benchmarking import benchmark, benchmark_many
from tfprune.litert.exporting import export
from tfprune.litert.flatbuffer import TensorInfo
from tfprune.litert.latency_table import LatencyTable, LayerTable, latency_table
from tfprune.litert.predicting import Predictor, to_litert
from tfprune.litert.report import (
    BenchmarkReport,
    ComparisonReport,
    CpuDelegation,
    ExportReport,
    GpuAudit,
    GpuObstacle,
    GpuRun,
    Latency,
    OperationLatency,
    OutputDifference,
    SparseReport,
    SparseTensor,
)
from tfprune.litert.sparsity import sparse_path
from tfprune.sparse_path import SparsePathReport

__all__ = [
    "BenchmarkReport",
    "ComparisonReport",
    "CpuDelegation",
    "ExportReport",
    "GpuAudit",
    "GpuObstacle",
    "GpuRun",
    "Latency",
    "LatencyTable",
    "LayerTable",
    "OperationLatency",
    "OutputDifference",
    "Predictor",
    "SparsePathReport",
    "SparseReport",
    "SparseTensor",
    "TensorInfo",
    "benchmark",
    "benchmark_many",
    "export",
    "latency_table",
    "sparse_path",
    "to_litert",
]

"""Evaluation of encoders: cached features, neighbours, probes, few labels, clusters, dense tasks, metrics and reports."""

from fastskel.evaluate.adapted import AdaptedEncoder
from fastskel.evaluate.classifier import Classifier, class_scores, load_classifier
from fastskel.evaluate.cluster import KMeans, evaluate_cluster, k_means
from fastskel.evaluate.dense import DenseConfig
from fastskel.evaluate.detection import ProposalConfig, evaluate_detection
from fastskel.evaluate.early import evaluate_early, first_frames
from fastskel.evaluate.evaluation import TASKS, Evaluation, Task
from fastskel.evaluate.features import FeatureSet, dataset_features, raw_features
from fastskel.evaluate.few_shot import evaluate_fewshot, evaluate_oneshot
from fastskel.evaluate.finetune import FinetuneConfig, Finetuned, evaluate_finetune, fine_tune
from fastskel.evaluate.frame_heads import FrameHeadConfig
from fastskel.evaluate.inference import extract
from fastskel.evaluate.knn import knn_neighbours, knn_predict, knn_rank
from fastskel.evaluate.linear import LinearConfig, LinearResult, choose_config, linear_probe
from fastskel.evaluate.logistic import LogisticConfig, LogisticResult, evaluate_logistic, logistic_probe
from fastskel.evaluate.metrics import accuracy, confusion_matrix, mean_class_accuracy, top_k_accuracy
from fastskel.evaluate.retrieval import average_precision, evaluate_retrieval, retrieval_scores
from fastskel.evaluate.run import evaluate_knn, evaluate_linear
from fastskel.evaluate.search import CosineSearch
from fastskel.evaluate.segmentation import evaluate_segmentation
from fastskel.evaluate.semi import evaluate_semi, labelled_subset
from fastskel.evaluate.transfer import adapt, evaluate_transfer
from fastskel.evaluate.windows import Windows, frame_features
from fastskel.evaluate.zero_shot import evaluate_zeroshot

__all__ = [
    "TASKS",
    "AdaptedEncoder",
    "Classifier",
    "CosineSearch",
    "DenseConfig",
    "Evaluation",
    "FeatureSet",
    "FinetuneConfig",
    "Finetuned",
    "FrameHeadConfig",
    "KMeans",
    "LinearConfig",
    "LinearResult",
    "LogisticConfig",
    "LogisticResult",
    "ProposalConfig",
    "Task",
    "Windows",
    "accuracy",
    "adapt",
    "average_precision",
    "choose_config",
    "class_scores",
    "confusion_matrix",
    "dataset_features",
    "evaluate_cluster",
    "evaluate_detection",
    "evaluate_early",
    "evaluate_fewshot",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_logistic",
    "evaluate_oneshot",
    "evaluate_retrieval",
    "evaluate_segmentation",
    "evaluate_semi",
    "evaluate_transfer",
    "evaluate_zeroshot",
    "extract",
    "fine_tune",
    "first_frames",
    "frame_features",
    "k_means",
    "knn_neighbours",
    "knn_predict",
    "knn_rank",
    "labelled_subset",
    "linear_probe",
    "load_classifier",
    "logistic_probe",
    "mean_class_accuracy",
    "raw_features",
    "retrieval_scores",
    "top_k_accuracy",
]

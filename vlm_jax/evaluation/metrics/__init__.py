"""Metrics of generated text, pure Python: captions, answers, boxes. Where one name stands for several computations, the way is part of the name."""
from vlm_jax.evaluation.metrics.answers import ANSWER_METRICS, anls, exact_match, pope, pope_splits, relaxed_accuracy
from vlm_jax.evaluation.metrics.boxes import box_text, iou, parse_boxes, referring
from vlm_jax.evaluation.metrics.captions import bleu, caption_scores, cider_d, rouge_l
from vlm_jax.evaluation.metrics.tokens import TOKENIZERS, ptb_like
from vlm_jax.evaluation.metrics.vqa import VQA_VARIANTS, vqa_accuracy

__all__ = ["ANSWER_METRICS", "TOKENIZERS", "VQA_VARIANTS", "anls", "bleu", "box_text", "caption_scores", "cider_d", "exact_match", "iou", "parse_boxes", "pope",
           "pope_splits", "ptb_like", "referring", "relaxed_accuracy", "rouge_l", "vqa_accuracy"]

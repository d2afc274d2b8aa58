"""The networks of the pruning papers, their pruned configurations, and one for the digits.

Each function returns an untrained functional ``keras.Model``, on any Keras 3 backend. Outputs are
logits unless ``classifier_activation`` says otherwise. Images are channels last, convolutions
carry no bias unless said, and padding and initial values are those of the papers' reference codes.
The parameter and multiply-accumulate counts of every network are tested against the papers'.
"""

from tfprune.zoo.densenet import densenet_cifar
from tfprune.zoo.digits import digits_resnet
from tfprune.zoo.preresnet import preresnet50, preresnet_cifar
from tfprune.zoo.published import RESNET50_INNER, RESNET_INNER, VGG_CIFAR, VGG_IMAGENET
from tfprune.zoo.resnet_cifar import resnet_cifar
from tfprune.zoo.resnet_imagenet import resnet34, resnet50
from tfprune.zoo.vgg_cifar import vgg_cifar
from tfprune.zoo.vgg_imagenet import vgg_imagenet

__all__ = [
    "RESNET50_INNER",
    "RESNET_INNER",
    "VGG_CIFAR",
    "VGG_IMAGENET",
    "densenet_cifar",
    "digits_resnet",
    "preresnet50",
    "preresnet_cifar",
    "resnet34",
    "resnet50",
    "resnet_cifar",
    "vgg_cifar",
    "vgg_imagenet",
]

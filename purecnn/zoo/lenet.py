"""LeNet-5 as it is taught today: ReLU and max pooling in the layout of 1998.

    LeCun, Bottou, Bengio, Haffner. Gradient-Based Learning Applied to Document Recognition. Proceedings of the
    IEEE 86(11), 1998, doi:10.1109/5.726791.

Deviations from the paper: ReLU instead of the scaled hyperbolic tangent, max pooling instead of trainable
subsampling, every map of the second convolution sees all maps of the first, and the output is linear instead of
radial basis functions. 61,706 parameters for one channel, 62,006 for three.
"""

from purecnn.initializers import Initializer, fans, uniform
from purecnn.layer import Layer, serial
from purecnn.layers import conv, flatten, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "Gradient-Based Learning Applied to Document Recognition",
    "LeCun, Bottou, Bengio, Haffner",
    1998,
    "doi:10.1109/5.726791",
    groups=(Group.SPATIAL,),
    in_survey=True,
)


def lenet5(*, num_classes: int = 10) -> Layer:
    """Figure 2 of the paper: C1 and S2 are the stem, C3 and S4 the first stage, C5 and F6 the second."""
    return serial(
        stem=serial(conv=conv(6, 5, padding=0, bias=True), relu=relu, pool=max_pool(2, 2)),
        stage1=serial(conv=conv(16, 5, padding=0, bias=True), relu=relu, pool=max_pool(2, 2)),
        stage2=serial(flatten, linear1=linear(120), relu1=relu, linear2=linear(84), relu2=relu),
        head=serial(linear=linear(num_classes)),
    )


def paper_law(path: str, shape: tuple[int, ...]) -> Initializer | float | None:
    """Appendix A of the paper: uniform on ``+-2.4 / fan_in``; here, biases start at zero."""
    if len(shape) == 1:
        return 0.0
    bound = 2.4 / fans(shape)[0]
    return uniform(-bound, bound)


VARIANTS = {
    "lenet5": Variant(
        lenet5,
        PAPER,
        image_size=32,
        in_channels=1,
        paper_law=paper_law,
        published=Published(68, "test accuracy", "CIFAR-10", "Mastering PyTorch, 2nd ed., ch. 2, in colour"),
    )
}

"""Names of FaceXFormer's classes, in the order of its outputs. Pure data.

Age, gender, race, attributes: github.com/Kartik-3004/facexformer, issues 5, 7 and 15. Race has two
orders: the authors published one, measurements of the released weights (98.0 % on UTKFace, whose
classes 2 and 3 are Asian and Indian) fit only the other. Parsing is LaPa's order; left and right
are the image's.
"""

AGE_LABELS = ("0-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "70 and over")  # years

GENDER_LABELS = ("Male", "Female")

RACE_LABELS = {
    "measured": ("White", "Black", "Asian", "Indian", "Others"),
    "as_published": ("White", "Black", "Indian", "Asian", "Others"),
    # Of a network that never learned it from real faces: nothing is said.
    "untaught": ("Others",) * 5,
}

ATTRIBUTES = (  # CelebA's
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs"),
    *("Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair"),
    *("Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair"),
    *("Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache"),
    *("Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline"),
    *("Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings"),
    *("Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young"),
)

PARSING_LABELS = (
    "background",
    "skin",
    "left eyebrow",
    "right eyebrow",
    "left eye",
    "right eye",
    "nose",
    "upper lip",
    "inner mouth",
    "lower lip",
    "hair",
)

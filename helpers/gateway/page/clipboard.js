// Copying.

// Return a button that copies what `textOf` returns. `name` is what screen readers call it; it begins with "Copy".
export const copyButton = (name, textOf) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.ariaLabel = name;
    button.addEventListener("click", async () => {
        await copy(textOf());
        [button.textContent, button.ariaLabel] = ["Copied", "Copied"];
        setTimeout(() => [button.textContent, button.ariaLabel] = ["Copy", name], 1500);
    });
    return button;
};

const copy = async text => {
    try {
        await navigator.clipboard.writeText(text);
    } catch { // without TLS, browsers offer only the old way
        const field = document.body.appendChild(document.createElement("textarea"));
        field.value = text;
        field.select();
        document.execCommand("copy");
        field.remove();
    }
};

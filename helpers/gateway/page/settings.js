// The form of the settings. Its fields have the names that the gateway's API gives them; an empty field is not sent.

const NUMBERS = ["temperature", "top_p", "max_completion_tokens", "seed"];

// Return the settings that are filled in and valid.
export const readSettings = form => {
    const settings = {};
    for (const name of NUMBERS) {
        const field = form.elements[name];
        if (field.value && field.validity.valid) settings[name] = field.valueAsNumber;
    }
    const stop = form.elements.stop.value.split("\n").filter(Boolean);
    if (stop.length) settings.stop = stop;
    return settings;
};

// Fill in the system prompt and the settings.
export const fillSettings = (form, {system, settings}) => {
    form.elements.system.value = system;
    for (const name of NUMBERS) form.elements[name].value = settings[name] ?? "";
    form.elements.stop.value = (settings.stop ?? []).join("\n");
};
